"""The retrieval task: query and candidate embeddings in, loss out."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import differ
from keras_rs_contrib.distribution import batch_split, num_replicas
from keras_rs_contrib.ids import IdArguments
from keras_rs_contrib.scores import check_similarity, pairwise_scores, to_comparable
from keras_rs_contrib.task import losses
from keras_rs_contrib.task.in_batch_softmax import BatchCandidates, BatchQueries, InBatchSoftmax

NEGATIVES = ("global", "local")


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class DistributedTwoTowerTask(IdArguments, keras.layers.Layer):  # type: ignore[misc]
    """The retrieval task of a two-tower model: a drop-in counterpart of `tfrs.tasks.Retrieval`.

    The layer owns no towers and no weights. Row i of the query embeddings and row i of the candidate embeddings are a
    positive pair. Without `labels`, the loss is a softmax over the batch, in which every other candidate is a negative;
    with `labels`, each pair's score is compared with its label. Under a `keras.distribution` the batch is the global
    one: a query on one device has the candidates of all devices as negatives, and loss and gradients are those of a
    single device.

    The steps of the softmax, each left out where its argument is not given: scores, `temperature`, log-q correction by
    `candidate_sampling_probability`, accidental hits, `score_mask`, hard negatives, loss. They are those of TFRS, in
    its order. What differs is the default loss, which is the mean over the valid rows and not the sum.

    From about 2,048 queries and as many candidates a device on, the default softmax does not hold the
    `[batch, num_candidates]` logits: it scores a block of queries at a time, with the gradients at once, in a tenth of
    the memory or less. The values are the same. A `loss` of the caller's own gets all the logits, in memory, as does
    any loss on another backend than JAX. Streamed gradients cannot be differentiated again.

    Args:
        loss: a `keras.losses.Loss` of (one-hot labels, logits), or of (labels, scores), both `[batch, 1]`, where
            `labels` are given. Its reduction is respected; without a reduction the result is `[batch]`. `None` is
            softmax cross-entropy, or mean squared error with `labels`, averaged over the valid rows.
        similarity: `"dot"`, or `"cosine"` to L2-normalise both sides before scoring.
        temperature: positive number that divides the scores, or `None` for 1.
        num_hard_negatives: positive int; only this many negatives with the largest logits are kept for each query.
            `None` keeps all.
        remove_accidental_hits: whether negatives with the id of the query's own positive are left out. Needs
            `candidate_ids`.
        negatives: `"global"`, or `"local"` to have as negatives only the candidates of the query's own part of the
            batch, and the extra ones. There is a part for each replica of the distribution in force, which then keeps
            its candidates to itself: without extra ones nothing but the loss travels between devices, and with them
            no more than a device's rows to their place. The batch must divide over the replicas. A loss of the
            caller's own gets labels and logits `[batch, batch / replicas + extra negatives]`. On one device both are
            the same.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if `loss` is no `keras.losses.Loss`, or an argument is of the wrong type.
        ValueError: if an argument is out of range, or, when called, if arguments do not fit one another.

    Example:
    ```python
    task = DistributedTwoTowerTask(temperature=0.1, remove_accidental_hits=True)
    query_embeddings = keras.random.normal((4, 8), seed=1)
    candidate_embeddings = keras.random.normal((4, 8), seed=2)
    loss = task(query_embeddings, candidate_embeddings, candidate_ids=np.array([7, 3, 7, 9]))
    ```

    Reference: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019.
    """

    def __init__(
        self,
        loss: keras.losses.Loss | None = None,
        similarity: str = "dot",
        temperature: float | None = None,
        num_hard_negatives: int | None = None,
        remove_accidental_hits: bool = False,
        negatives: str = "global",
        **kwargs: Any,
    ) -> None:
        # No autocast: under a mixed precision policy it would round probabilities, weights and labels to 8 bits.
        super().__init__(autocast=False, **kwargs)
        if loss is not None and not isinstance(loss, keras.losses.Loss):
            raise TypeError(
                f"`loss` must be a `keras.losses.Loss`. Received: loss={loss!r} (of type {type(loss).__name__}). "
                "Pass an instance, such as `keras.losses.CategoricalCrossentropy(from_logits=True)`."
            )
        self.loss = loss
        self.similarity = check_similarity(similarity)
        self.temperature = _check_temperature(temperature)
        self.num_hard_negatives = _check_num_hard_negatives(num_hard_negatives)
        if not isinstance(remove_accidental_hits, (bool, np.bool_)):
            raise TypeError(
                "`remove_accidental_hits` must be a bool. Received: "
                f"remove_accidental_hits={remove_accidental_hits!r}. Pass True or False."
            )
        self.remove_accidental_hits = bool(remove_accidental_hits)
        if negatives not in NEGATIVES:
            raise ValueError(
                f"`negatives` must be one of {NEGATIVES}. Received: negatives={negatives!r}. "
                'Use "global" for those of all replicas, "local" for those of the query\'s own replica.'
            )
        self.negatives = negatives
        # Masks of the towers (`Embedding(mask_zero=True)`) end here, without a warning.
        self.supports_masking = True
        self.built = True

    def call(
        self,
        query_embeddings: Any,
        candidate_embeddings: Any,
        labels: Any = None,
        sample_weight: Any = None,
        candidate_ids: Any = None,
        candidate_sampling_probability: Any = None,
        score_mask: Any = None,
        candidate_mask: Any = None,
    ) -> Any:
        """Computes the loss of a batch.

        Args:
            query_embeddings: `[batch, embedding_dim]` float, or `[batch, num_heads, embedding_dim]`, where each
                candidate is scored by the query's best head.
            candidate_embeddings: `[num_candidates, embedding_dim]` float, `num_candidates >= batch`: row i is the
                positive of query i, rows from `batch` on are extra negatives for every query.
            labels: `[batch]` float; if given, the loss is pointwise, and the arguments about negatives are errors.
            sample_weight: `[batch]` float weights of the queries.
            candidate_ids: `[num_candidates]` int ids, for the removal of accidental hits.
            candidate_sampling_probability: `[num_candidates]` float, the probability of each candidate to be drawn
                into a batch, clipped to [1e-6, 1].
            score_mask: `[batch, num_candidates]` bool; False leaves the candidate out for that query.
            candidate_mask: `[num_candidates]` bool; False marks padding: never a negative, and the query of its row
                weighs nothing.

        Returns:
            Scalar float32 loss, or `[batch]` where `loss` has no reduction.

        Raises:
            ValueError: if shapes or arguments do not fit one another.
        """
        given = {
            "labels": labels,
            "sample_weight": sample_weight,
            "candidate_ids": candidate_ids,
            "candidate_sampling_probability": candidate_sampling_probability,
            "score_mask": score_mask,
            "candidate_mask": candidate_mask,
        }
        query_embeddings = _to_tensor("query_embeddings", query_embeddings)
        candidate_embeddings = _to_tensor("candidate_embeddings", candidate_embeddings)
        given = {name: None if value is None else _to_tensor(name, value) for name, value in given.items()}
        self._check_shapes(query_embeddings, candidate_embeddings, given)
        self._check_divides(query_embeddings.shape[0])

        sample_weight = given["sample_weight"]
        if sample_weight is not None:
            sample_weight = ops.cast(sample_weight, "float32")
        valid = None
        if candidate_mask is not None:
            candidate_mask = ops.cast(given["candidate_mask"], "bool")
            num_queries = ops.shape(query_embeddings)[0]
            valid = candidate_mask[:num_queries]
            # What stands in a padded row, even NaN, must reach neither the loss nor a gradient.
            query_embeddings = _zero_where_false(valid, query_embeddings)
            candidate_embeddings = _zero_where_false(candidate_mask, candidate_embeddings)
            if sample_weight is not None:
                sample_weight = _zero_where_false(valid, sample_weight)

        if labels is not None:
            labels = ops.cast(given["labels"], "float32")
            if valid is not None:
                labels = _zero_where_false(valid, labels)
            return self._pointwise_loss(query_embeddings, candidate_embeddings, labels, sample_weight, valid)

        probability = given["candidate_sampling_probability"]
        if probability is not None and candidate_mask is not None:
            probability = _zero_where_false(candidate_mask, probability)
        queries = BatchQueries(
            to_comparable(query_embeddings, self.similarity), sample_weight, given["score_mask"], valid
        )
        candidates = BatchCandidates(
            to_comparable(candidate_embeddings, self.similarity),
            None if probability is None else ops.cast(probability, "float32"),
            given["candidate_ids"],
            candidate_mask,
        )
        return self._in_batch_loss(queries, candidates)

    def _in_batch_loss(self, queries: BatchQueries, candidates: BatchCandidates) -> Any:
        num_queries, num_candidates = queries.embeddings.shape[0], candidates.embeddings.shape[0]
        # Keras traces models with sizes that are no numbers, to learn shapes and dtypes alone.
        split = batch_split(num_queries) if isinstance(num_queries, int) else None
        softmax = InBatchSoftmax(
            temperature=self.temperature,
            remove_accidental_hits=self.remove_accidental_hits,
            num_hard_negatives=self.num_hard_negatives,
            split=split,
            is_local=self.negatives == "local",
        )
        if self.loss is None and softmax.streams(num_queries, num_candidates):
            count = losses.count_of_valid_rows(num_queries, queries.valid)
            return ops.divide(softmax.total_loss(queries, candidates), count)
        logits, one_hot = softmax.logits(queries, candidates)
        if self.loss is None:
            values = losses.softmax_cross_entropy(one_hot, logits)
            return losses.mean_over_valid_rows(values, queries.sample_weight, queries.valid)
        return _reduced(self.loss, one_hot, logits, queries.sample_weight, queries.valid)

    def _pointwise_loss(self, queries: Any, candidates: Any, labels: Any, sample_weight: Any, valid: Any) -> Any:
        scores = pairwise_scores(queries, candidates, self.similarity)
        if self.temperature is not None:
            scores = ops.divide(scores, self.temperature)
        if self.loss is None:
            return losses.mean_over_valid_rows(ops.square(ops.subtract(labels, scores)), sample_weight, valid)
        return _reduced(self.loss, ops.expand_dims(labels, 1), ops.expand_dims(scores, 1), sample_weight, valid)

    def _check_divides(self, num_queries: int | None) -> None:
        replicas = num_replicas()
        # Keras traces models with sizes that are made up, or no numbers.
        if (
            self.negatives == "global"
            or _keras.is_tracing_symbolically()
            or num_queries is None
            or num_queries % replicas == 0
        ):
            return
        raise ValueError(
            'With `negatives="local"` the batch must divide over the replicas, each of which has a part of its own. '
            f"Received: {num_queries} queries for {replicas} replicas. Pad the batch, for instance by "
            '`keras_rs_contrib.pad_batches`, and mark the padding in `candidate_mask`, or use `negatives="global"`.'
        )

    def compute_output_spec(
        self, query_embeddings: Any, candidate_embeddings: Any, *args: Any, **kwargs: Any
    ) -> keras.KerasTensor:
        """Returns the shape and dtype of the loss, and raises as `call` does."""
        bound = inspect.signature(self.call).bind(query_embeddings, candidate_embeddings, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        self._check_shapes(given.pop("query_embeddings"), given.pop("candidate_embeddings"), given)
        unreduced = self.loss is not None and self.loss.reduction in (None, "none")
        return keras.KerasTensor((query_embeddings.shape[0],) if unreduced else (), dtype="float32")

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: a loss carries no mask."""
        return

    def _check_shapes(self, query_embeddings: Any, candidate_embeddings: Any, given: dict[str, Any]) -> None:
        query_shape, candidate_shape = tuple(query_embeddings.shape), tuple(candidate_embeddings.shape)
        if len(query_shape) not in (2, 3) or len(candidate_shape) != 2:
            raise ValueError(
                "`query_embeddings` must be `[batch, embedding_dim]` or `[batch, num_heads, embedding_dim]`, and "
                "`candidate_embeddings` `[num_candidates, embedding_dim]`. Received: shapes "
                f"{query_shape} and {candidate_shape}. Flatten or expand the output of the towers to these ranks."
            )
        if differ(query_shape[-1], candidate_shape[-1]):
            raise ValueError(
                "Both towers must give embeddings of the same dimension. Received: "
                f"{query_shape[-1]} for the queries and {candidate_shape[-1]} for the candidates. "
                "Project one of them, for instance by a last `keras.layers.Dense`."
            )
        batch, num_candidates = query_shape[0], candidate_shape[0]
        if batch is not None and num_candidates is not None and num_candidates < batch:
            raise ValueError(
                "Each query needs its positive candidate in the row of the same number. Received: "
                f"{batch} queries and {num_candidates} candidates. Pass at least as many candidates as queries."
            )
        expected = {
            "labels": (batch,),
            "sample_weight": (batch,),
            "candidate_ids": (num_candidates,),
            "candidate_sampling_probability": (num_candidates,),
            "score_mask": (batch, num_candidates),
            "candidate_mask": (num_candidates,),
        }
        for name, shape in expected.items():
            if given[name] is None:
                continue
            received = tuple(given[name].shape)
            if len(received) != len(shape) or any(map(differ, received, shape)):
                raise ValueError(
                    f"`{name}` must have shape {shape} for {batch} queries and {num_candidates} candidates. "
                    f"Received: shape {received}. {_SHAPE_CURES[name]}"
                )
        if given["candidate_ids"] is not None:
            dtype = keras.backend.standardize_dtype(given["candidate_ids"].dtype)
            if "int" not in dtype:
                raise TypeError(
                    f"`candidate_ids` must be integers. Received: dtype {dtype}. "
                    "Map ids to integers first, strings for instance by `keras.layers.StringLookup`."
                )
        if given["labels"] is None:
            if self.remove_accidental_hits and given["candidate_ids"] is None:
                raise ValueError(
                    "`remove_accidental_hits=True` needs the ids of the candidates. Received: candidate_ids=None. "
                    "Pass `candidate_ids`, one int for each row of `candidate_embeddings`."
                )
            return
        about_negatives = [
            name
            for name in ("candidate_ids", "candidate_sampling_probability", "score_mask")
            if given[name] is not None
        ]
        if self.num_hard_negatives is not None:
            about_negatives.append("num_hard_negatives")
        if self.remove_accidental_hits:
            about_negatives.append("remove_accidental_hits")
        if self.negatives == "local":
            about_negatives.append("negatives")
        if about_negatives:
            raise ValueError(
                "With `labels` each query scores its own candidate only: there are no negatives. Received: `labels` "
                f"together with {', '.join(f'`{name}`' for name in about_negatives)}. Drop the one or the other."
            )
        if differ(batch, num_candidates):
            raise ValueError(
                "With `labels` each query scores its own candidate only. Received: "
                f"{batch} queries and {num_candidates} candidates. Leave out the extra negatives, or the labels."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized."""
        config: dict[str, Any] = super().get_config()
        config.update(
            loss=None if self.loss is None else keras.losses.serialize(self.loss),
            similarity=self.similarity,
            temperature=self.temperature,
            num_hard_negatives=self.num_hard_negatives,
            remove_accidental_hits=self.remove_accidental_hits,
            negatives=self.negatives,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistributedTwoTowerTask:
        """Returns the task that `get_config` describes."""
        config = dict(config)
        if isinstance(config.get("loss"), dict):
            config["loss"] = keras.losses.deserialize(config["loss"])
        return cls(**config)


_SHAPE_CURES = {
    "labels": "Give one number for each query.",
    "sample_weight": "Give one weight for each query.",
    "candidate_ids": "Include the ids of the extra negatives.",
    "candidate_sampling_probability": "Include the probabilities of the extra negatives.",
    "score_mask": "Give one bool for each pair of a query and a candidate.",
    "candidate_mask": "Include the extra negatives.",
}


def _check_temperature(temperature: float | None) -> float | None:
    if temperature is None:
        return None
    if not isinstance(temperature, numbers.Real) or isinstance(temperature, bool):
        raise TypeError(f"`temperature` must be a number. Received: temperature={temperature!r}. Use None for none.")
    if not np.finfo(np.float32).tiny <= temperature <= np.finfo(np.float32).max:
        raise ValueError(
            "`temperature` divides the scores and must be positive and finite, as a float32. "
            f"Received: temperature={temperature!r}. Use None to leave the scores as they are."
        )
    return float(temperature)


def _check_num_hard_negatives(num_hard_negatives: int | None) -> int | None:
    if num_hard_negatives is None:
        return None
    if not isinstance(num_hard_negatives, numbers.Integral) or isinstance(num_hard_negatives, bool):
        raise TypeError(
            "`num_hard_negatives` must be an int. "
            f"Received: num_hard_negatives={num_hard_negatives!r}. Use None to keep all negatives."
        )
    if num_hard_negatives < 1:
        raise ValueError(
            "`num_hard_negatives` must be at least 1: with no negative there is nothing to learn. "
            f"Received: num_hard_negatives={num_hard_negatives}. Use None to keep all negatives."
        )
    return int(num_hard_negatives)


def _to_tensor(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        raise TypeError(
            f"`{name}` must be one array. Received: a dict with the keys {list(value)}. Pass one of its values; where "
            "`fit` is given a dict of targets, Keras makes `sample_weight` a dict of the same keys."
        )
    return ops.convert_to_tensor(value)


def _zero_where_false(rows: Any, values: Any) -> Any:
    """Returns `values` with the rows outside the `[num_rows]` bool `rows` set to 0."""
    for _ in range(len(values.shape) - 1):
        rows = ops.expand_dims(rows, -1)
    return ops.where(rows, values, ops.zeros_like(values))


def _reduced(loss: keras.losses.Loss, labels: Any, predictions: Any, sample_weight: Any, valid: Any) -> Any:
    """Returns the loss over the valid rows, reduced as `loss` says."""
    if valid is not None:
        weight = ops.cast(valid, "float32")
        if loss.reduction in ("sum_over_batch_size", "mean"):
            # Keras divides by all rows; only the valid ones count.
            num_rows = ops.cast(ops.shape(weight)[0], "float32")
            weight = ops.multiply(weight, ops.divide(num_rows, ops.maximum(ops.sum(weight), 1.0)))
        sample_weight = weight if sample_weight is None else ops.multiply(sample_weight, weight)
    return ops.cast(loss(labels, predictions, sample_weight=sample_weight), "float32")
