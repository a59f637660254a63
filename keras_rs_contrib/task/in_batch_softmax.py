"""The in-batch softmax: its logits, and a streamed loss that never stores the full logit matrix.

The loss is a sum over queries, and each query needs only its own row of logits. The streamed loss therefore processes
the queries in blocks. For each block it computes the logits, their loss and their contribution to every gradient, and
then discards the logits. This takes three matrix products, as many as with the full logit matrix in memory. A separate
backward pass would compute the logits again and take four.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax import lax
from jax.sharding import PartitionSpec
from keras import ops

from keras_rs_contrib.distribution import BatchSplit
from keras_rs_contrib.scores import own_scores, score_matrix
from keras_rs_contrib.task import logits as batch_logits
from keras_rs_contrib.task import losses

# Streaming starts at this many logits per device. Measured on CPUs: with 1,024 queries and 1,024 candidates, streaming
# is as fast as the full matrix; with 2,048 of each, it takes 75% of the time.
MIN_STREAMED_LOGITS = 2**22

# Logits per block: 8 MiB in float32. A block four times as large takes four times the memory, without a speedup.
BLOCK_LOGITS = 2**21

# Keeps the products matrix-matrix (not matrix-vector) when there are very many candidates.
MIN_BLOCK_QUERIES = 8


class BatchQueries(NamedTuple):
    """The queries of a batch. A field that is not given is `None`.

    Attributes:
        embeddings: `[num_queries, embedding_dim]` or `[num_queries, num_heads, embedding_dim]` float32.
        sample_weight: `[num_queries]` float32.
        score_mask: `[num_queries, num_candidates]` bool.
        valid: `[num_queries]` bool; False marks padding.
        positive_ids: `[num_queries, m]` int32, padded with -1.
        negative_embeddings: `[num_queries, n, embedding_dim]` float32, the negatives of each query alone.
        negative_sampling_probability: `[num_queries, n]` float32.
        negative_mask: `[num_queries, n]` bool; False marks padding and positives.
    """

    embeddings: Any
    sample_weight: Any = None
    score_mask: Any = None
    valid: Any = None
    positive_ids: Any = None
    negative_embeddings: Any = None
    negative_sampling_probability: Any = None
    negative_mask: Any = None

    @property
    def num_own_negatives(self) -> int:
        """The number of negatives that each query has for itself."""
        return 0 if self.negative_embeddings is None else int(self.negative_embeddings.shape[1])


class BatchCandidates(NamedTuple):
    """The candidates of a batch. A field that is not given is `None`.

    Attributes:
        embeddings: `[num_candidates, embedding_dim]` float32.
        sampling_probability: `[num_candidates]` float32.
        ids: `[num_candidates]` int.
        mask: `[num_candidates]` bool; False marks padding.
    """

    embeddings: Any
    sampling_probability: Any = None
    ids: Any = None
    mask: Any = None

    @property
    def num_present(self) -> Any:
        """The number of candidates without padding, scalar float32, at least 1."""
        return losses.count_of_valid_rows(ops.shape(self.embeddings)[0], self.mask)


@dataclasses.dataclass(frozen=True)
class InBatchSoftmax:
    """Configuration of the in-batch softmax: how to compute the logits, and which candidates are negatives.

    Attributes:
        temperature: float that divides the scores, or `None` for 1.
        remove_accidental_hits: bool, whether to mask negatives that have the id of the query's positive.
        num_hard_negatives: int, number of negatives to keep for each query, or `None` for all.
        split: `BatchSplit` of the queries over the devices, or `None` if each device computes the whole batch.
        is_local: bool, whether the negatives of a query are only the candidates of its part of the split and the extra
            negatives.
        block_logits: int, approximate number of logits in memory at a time.
    """

    temperature: float | None
    remove_accidental_hits: bool
    num_hard_negatives: int | None
    split: BatchSplit | None = None
    is_local: bool = False
    block_logits: int = dataclasses.field(default_factory=lambda: BLOCK_LOGITS)

    def streams(self, queries: BatchQueries, candidates: BatchCandidates) -> bool:
        """Returns whether the batch is large enough for streaming to be faster.

        Returns False on backends other than JAX, and for unknown sizes, as in symbolic tracing by Keras.
        """
        num_queries, num_candidates = queries.embeddings.shape[0], candidates.embeddings.shape[0]
        if keras.backend.backend() != "jax" or not isinstance(num_queries, int) or not isinstance(num_candidates, int):
            return False
        num_parts = 1 if self.split is None else self.split.num_replicas
        if self.split is not None and self.is_local:
            num_candidates -= num_queries - num_queries // num_parts
        num_logits = num_candidates + queries.num_own_negatives
        return bool(num_queries // num_parts * num_logits >= MIN_STREAMED_LOGITS)

    def logits(self, queries: BatchQueries, candidates: BatchCandidates) -> tuple[Any, Any]:
        """Returns the full logit matrix of a batch and its one-hot labels.

        Returns:
            Logits and labels, both `[num_queries, num_candidates + n]` float32, the query's own negatives last. Local
            negatives leave one column for each candidate of the query's part, for each extra negative and for each own
            negative. `num_hard_negatives` leaves the positive and that many negatives.
        """
        if self.split is None or not self.is_local:
            return self._logits(*_with_numbers(queries, candidates))
        rows = PartitionSpec(self.split.axis)

        def on_replica(queries: BatchQueries, own: BatchCandidates, extra: BatchCandidates) -> tuple[Any, Any]:
            return self._logits(*_with_numbers(*self._own_part(queries, own, extra)))

        return tuple(
            jax.shard_map(
                on_replica, mesh=self.split.mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=(rows, rows)
            )(queries, *_own_and_extra(queries, candidates))
        )

    def total_loss(self, queries: BatchQueries, candidates: BatchCandidates) -> Any:
        """Returns the weighted sum of the cross-entropies of the valid rows, with `block_logits` logits in memory.

        Formula: `sum(sample_weight[i] * cross_entropy(labels[i], logits[i]))` over the valid queries `i`.

        Requires the JAX backend.

        Returns:
            Scalar float32, differentiable once, in reverse mode.
        """
        # Compiled as a whole: in eager mode, every call would compile the loop again.
        is_split = self.split is not None and self.is_local
        parts = _own_and_extra(queries, candidates) if is_split else (candidates,)
        return _compiled_total_loss(self, queries, parts)

    def _logits(self, queries: BatchQueries, candidates: BatchCandidates, first_query: Any = 0) -> tuple[Any, Any]:
        """Returns logits and labels of a block of queries. The positive of row `i` is candidate `first_query + i`.

        If there are `positive_ids`, all ids are numbers, as `_with_numbers` returns them.
        """
        logits, labels = self._candidate_logits(queries, candidates, first_query)
        if queries.negative_embeddings is not None:
            own = self._own_negative_logits(queries, candidates)
            logits = ops.concatenate([logits, own], axis=1)
            labels = ops.concatenate([labels, ops.zeros_like(own)], axis=1)
        if self.num_hard_negatives is not None:
            logits, labels = batch_logits.hardest_negatives(logits, labels, self.num_hard_negatives)
        return logits, labels

    def _candidate_logits(
        self, queries: BatchQueries, candidates: BatchCandidates, first_query: Any
    ) -> tuple[Any, Any]:
        # The caller has already normalized both sides: here, every block would normalize all candidates again.
        logits = self._scaled(score_matrix(queries.embeddings, candidates.embeddings, "dot"))
        labels = batch_logits.positive_labels(logits, first_query)
        if candidates.sampling_probability is not None:
            logits = batch_logits.subtract_log_probability(
                logits, candidates.sampling_probability, candidates.num_present
            )
        if self.remove_accidental_hits:
            hits = batch_logits.accidental_hits(labels, candidates.ids, first_query)
            logits = batch_logits.mask_logits(logits, ops.logical_not(hits))
        if queries.positive_ids is not None:
            hits = batch_logits.known_positives(labels, candidates.ids, queries.positive_ids)
            logits = batch_logits.mask_logits(logits, ops.logical_not(hits))
        if queries.score_mask is not None:
            logits = batch_logits.mask_logits(logits, ops.cast(queries.score_mask, "bool"))
        if candidates.mask is not None:
            logits = batch_logits.mask_logits(logits, ops.expand_dims(candidates.mask, 0))
        return logits, labels

    def _own_negative_logits(self, queries: BatchQueries, candidates: BatchCandidates) -> Any:
        logits = self._scaled(own_scores(queries.embeddings, queries.negative_embeddings, "dot"))
        if queries.negative_sampling_probability is not None:
            logits = batch_logits.subtract_log_probability(
                logits, queries.negative_sampling_probability, candidates.num_present
            )
        if queries.negative_mask is not None:
            logits = batch_logits.mask_logits(logits, queries.negative_mask)
        return logits

    def _scaled(self, scores: Any) -> Any:
        return scores if self.temperature is None else ops.divide(scores, self.temperature)

    def _own_part(
        self, queries: BatchQueries, own: BatchCandidates, extra: BatchCandidates
    ) -> tuple[BatchQueries, BatchCandidates]:
        """Returns the part of the batch on this replica, in which candidate `i` is the positive of query `i`."""
        assert self.split is not None
        if queries.score_mask is not None:
            num_own = own.embeddings.shape[0]
            first = lax.axis_index(self.split.axis) * num_own
            columns = lax.dynamic_slice_in_dim(queries.score_mask, first, num_own, axis=1)
            extra_columns = queries.score_mask[:, num_own * self.split.num_replicas :]
            queries = queries._replace(score_mask=jnp.concatenate([columns, extra_columns], axis=1))
        return queries, jax.tree.map(lambda *parts: jnp.concatenate(parts), own, extra)

    def _rows_loss(self, queries: BatchQueries, candidates: BatchCandidates, first_query: Any) -> Any:
        logits, labels = self._logits(queries, candidates, first_query)
        values = losses.softmax_cross_entropy(labels, logits)
        return losses.sum_over_valid_rows(values, queries.sample_weight, queries.valid)

    def _rows_loss_and_gradients(self, queries: BatchQueries, candidates: BatchCandidates, first_query: Any) -> Any:
        def logits_of(of_queries: BatchQueries, of_candidates: BatchCandidates) -> Any:
            return self._logits(_with(queries, of_queries), _with(candidates, of_candidates), first_query)

        logits, pull_back, labels = jax.vjp(logits_of, *_differentiable(queries, candidates), has_aux=True)
        values, of_logits = losses.softmax_cross_entropy_and_gradient(labels, logits)

        def total(values: Any, sample_weight: Any) -> Any:
            return losses.sum_over_valid_rows(values, sample_weight, queries.valid)

        result, (of_values, of_weight) = jax.value_and_grad(total, argnums=(0, 1))(values, queries.sample_weight)
        of_queries, of_candidates = pull_back(of_logits * of_values[:, None])
        return result, (of_queries._replace(sample_weight=of_weight), of_candidates)

    def _in_blocks(
        self, queries: BatchQueries, candidates: BatchCandidates, first_query: Any, with_gradients: bool
    ) -> Any:
        """Returns the total loss of the queries, computed block by block, and optionally its gradients."""
        function = self._rows_loss_and_gradients if with_gradients else self._rows_loss
        # Once for all blocks, because it sorts the ids of all candidates.
        queries, candidates = _with_numbers(queries, candidates)
        num_queries = queries.embeddings.shape[0]
        num_heads = 1 if queries.embeddings.ndim == 2 else queries.embeddings.shape[1]
        logits_per_query = num_heads * (candidates.embeddings.shape[0] + queries.num_own_negatives)
        num_blocks = -(-num_queries // max(self.block_logits // logits_per_query, MIN_BLOCK_QUERIES))
        if num_blocks <= 1:
            return function(queries, candidates, first_query)
        block = -(-num_queries // num_blocks)
        valid = jnp.ones(num_queries, bool) if queries.valid is None else queries.valid

        def step(so_far: Any, number: Any) -> tuple[Any, None]:
            # All blocks have the same size, so the last one may overlap the one before: its repeated rows are masked.
            start = jnp.minimum(number * block, num_queries - block)
            rows = jax.tree.map(
                lambda array: lax.dynamic_slice_in_dim(array, start, block), queries._replace(valid=valid)
            )
            rows = rows._replace(valid=rows.valid & (start + jnp.arange(block) >= number * block))
            result = function(rows, candidates, first_query + start)
            if not with_gradients:
                return so_far + result, None
            (loss, (of_queries, of_candidates)), (added, (of_rows, added_of_candidates)) = so_far, result

            def add_rows(total: Any, part: Any) -> Any:
                part = part + lax.dynamic_slice_in_dim(total, start, block)
                return lax.dynamic_update_slice_in_dim(total, part, start, axis=0)

            of_queries = jax.tree.map(add_rows, of_queries, of_rows)
            of_candidates = jax.tree.map(jnp.add, of_candidates, added_of_candidates)
            return (loss + added, (of_queries, of_candidates)), None

        zero: Any = jnp.zeros((), "float32")
        if with_gradients:
            zero = zero, jax.tree.map(jnp.zeros_like, _differentiable(queries, candidates))
        return lax.scan(step, zero, jnp.arange(num_blocks))[0]

    def _on_replicas(self, queries: BatchQueries, parts: tuple[BatchCandidates, ...], with_gradients: bool) -> Any:
        """Returns the total loss, and optionally its gradients. Each replica computes the loss of its own queries.

        Args:
            queries: the queries of the whole batch.
            parts: all candidates as one part, or, with local negatives on several replicas, two parts: the candidates
                of the batch, which are split like the queries, and the extra negatives, which are replicated.
            with_gradients: bool, whether to also return the gradients.
        """
        if self.split is None:
            result = self._in_blocks(queries, parts[0], 0, with_gradients)
            return (result[0], (result[1][0], (result[1][1],))) if with_gradients else result
        axis, rows, whole = self.split.axis, PartitionSpec(self.split.axis), PartitionSpec()
        specs = (rows, whole) if self.is_local else (whole,)

        def on_replica(queries: BatchQueries, *parts: BatchCandidates) -> Any:
            if self.is_local:
                result = self._in_blocks(*self._own_part(queries, *parts), 0, with_gradients)
            else:
                first_query = lax.axis_index(axis) * queries.embeddings.shape[0]
                result = self._in_blocks(queries, parts[0], first_query, with_gradients)
            if not with_gradients:
                return lax.psum(result, axis)
            loss, (of_queries, of_candidates) = result
            of_parts, first = [], 0
            for part, spec in zip(parts, specs, strict=True):
                of_rows = slice(first, first + part.embeddings.shape[0])
                of_part = jax.tree.map(operator.itemgetter(of_rows), of_candidates)
                of_parts.append(of_part if spec == rows else lax.psum(of_part, axis))
                first = of_rows.stop
            return lax.psum(loss, axis), (of_queries, tuple(of_parts))

        return jax.shard_map(
            on_replica,
            mesh=self.split.mesh,
            in_specs=(rows, *specs),
            out_specs=(whole, (rows, specs)) if with_gradients else whole,
            # The gradients are explicit, so JAX does not need to track which values are equal on all devices.
            check_vma=False,
        )(queries, *parts)


def _differentiable(queries: BatchQueries, candidates: BatchCandidates) -> tuple[BatchQueries, BatchCandidates]:
    """Returns the fields that have gradients."""
    return (
        BatchQueries(
            queries.embeddings,
            sample_weight=queries.sample_weight,
            negative_embeddings=queries.negative_embeddings,
            negative_sampling_probability=queries.negative_sampling_probability,
        ),
        BatchCandidates(candidates.embeddings, sampling_probability=candidates.sampling_probability),
    )


def _with(whole: Any, part: Any) -> Any:
    """Returns a named tuple with the fields that another one has."""
    return whole._replace(**{name: value for name, value in part._asdict().items() if value is not None})


def _with_numbers(queries: BatchQueries, candidates: BatchCandidates) -> tuple[BatchQueries, BatchCandidates]:
    """Returns the batch with the results of `number_ids` in place of ids, if there are `positive_ids`."""
    if queries.positive_ids is None:
        return queries, candidates
    candidate_numbers, positive_numbers = batch_logits.number_ids(candidates.ids, queries.positive_ids)
    return queries._replace(positive_ids=positive_numbers), candidates._replace(ids=candidate_numbers)


def _own_and_extra(queries: BatchQueries, candidates: BatchCandidates) -> tuple[BatchCandidates, BatchCandidates]:
    num_queries = queries.embeddings.shape[0]
    own = jax.tree.map(lambda array: array[:num_queries], candidates)
    return own, jax.tree.map(lambda array: array[num_queries:], candidates)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total_loss(softmax: InBatchSoftmax, queries: BatchQueries, parts: tuple[BatchCandidates, ...]) -> Any:
    return softmax._on_replicas(queries, parts, with_gradients=False)


def _forward(softmax: InBatchSoftmax, queries: BatchQueries, parts: tuple[BatchCandidates, ...]) -> tuple[Any, Any]:
    # The loss is a scalar, so the backward pass only multiplies these gradients by one factor.
    result: tuple[Any, Any] = softmax._on_replicas(queries, parts, with_gradients=True)
    return result


def _backward(softmax: InBatchSoftmax, gradients: Any, of_loss: Any) -> Any:
    return jax.tree.map(lambda gradient: gradient * of_loss, gradients)


_total_loss.defvjp(_forward, _backward)
_compiled_total_loss = jax.jit(_total_loss, static_argnums=0)
