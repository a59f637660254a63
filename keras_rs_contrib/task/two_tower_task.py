"""The retrieval task: a layer that computes a loss from query and candidate embeddings."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import explains_keywords
from keras_rs_contrib.distribution import batch_split, num_replicas
from keras_rs_contrib.ids import IdArguments
from keras_rs_contrib.scores import check_similarity, comparable_candidates, comparable_queries, pairwise_scores
from keras_rs_contrib.task import logits as batch_logits
from keras_rs_contrib.task import losses
from keras_rs_contrib.task.call_arguments import (
    ID_ARGUMENTS,
    CallArguments,
    check_arguments,
    to_tensors,
    valid_queries,
    without_padding,
)
from keras_rs_contrib.task.in_batch_softmax import BatchCandidates, BatchQueries, InBatchSoftmax

NEGATIVES = ("global", "local")


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class DistributedTwoTowerTask(IdArguments, keras.layers.Layer):  # type: ignore[misc]
    """The retrieval task of a two-tower model, a drop-in counterpart of `tfrs.tasks.Retrieval`.

    The layer has no towers and no weights. Row i of the query embeddings and row i of the candidate embeddings are a
    positive pair. Without `labels`, the loss is an in-batch softmax: all other candidates are negatives, except known
    positives (`positive_ids`), and a query can have negatives of its own (`negative_embeddings`). With `labels`, the
    loss compares each pair's score with its label. Under a `keras.distribution`, the batch is the global batch: a query
    on one device has the candidates of all devices as negatives, and loss and gradients equal those of a single device.

    The softmax loss has the steps of TFRS in the same order: scores, `temperature`, log-q correction with
    `candidate_sampling_probability`, accidental hits, `positive_ids`, `score_mask`, hard negatives, loss. A step is
    skipped if its argument is not given. The default loss is the mean over the valid rows; that of TFRS is the sum.

    From about 2,048 queries and 2,048 candidates per device, the default softmax loss is streamed: it processes the
    queries in blocks, computes loss and gradients together, and does not store the `[batch, num_candidates]` logits.
    The values are the same, and the memory is at most a tenth. A streamed loss can be differentiated only once. A
    custom `loss`, and every loss on a backend other than JAX, gets the full logits.

    Args:
        loss: `keras.losses.Loss` of one-hot labels and logits, or, with `labels`, of labels and scores, both
            `[batch, 1]`. Its reduction is respected; without a reduction, the result is `[batch]`. `None` means softmax
            cross-entropy, or mean squared error with `labels`, averaged over the valid rows.
        similarity: `"dot"`, `"cosine"` to L2-normalize both sides before scoring, or `"biased_cosine"`, with which the
            last element of a candidate embedding is a bias: `score = cosine(q', c') + b` for `c = [c', b]`, where `q'`
            is the query embedding without its last element, which is not used.
        temperature: positive float that divides the scores, or `None` for 1.
        num_hard_negatives: positive int, number of negatives to keep for each query, those with the largest logits.
            `None` keeps all.
        remove_accidental_hits: bool, whether to mask negatives that have the id of the query's positive. Requires
            `candidate_ids`.
        negatives: `"global"` or `"local"`. With `"local"`, each replica of the distribution in force has one part of
            the batch, and the negatives of a query are the candidates of its part and the extra negatives. Without
            extra negatives, only the loss travels between devices; with them, each transfer is at most one replica's
            share of the candidates. The number of replicas must divide the batch size. A custom `loss` gets labels and
            logits with a column for each candidate of the part, each extra negative and each of `negative_embeddings`.
            On one device, both settings are the same.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or, in a call, if arguments are inconsistent.

    Example:
    ```python
    task = DistributedTwoTowerTask(temperature=0.1, remove_accidental_hits=True)
    query_embeddings = keras.random.normal((4, 8), seed=1)
    candidate_embeddings = keras.random.normal((4, 8), seed=2)
    loss = task(query_embeddings, candidate_embeddings, candidate_ids=np.array([7, 3, 7, 9]))
    ```

    Reference: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys 2019.
    """

    id_arguments = ID_ARGUMENTS

    @explains_keywords
    def __init__(
        self,
        loss: keras.losses.Loss | None = None,
        *,
        similarity: str = "dot",
        temperature: float | None = None,
        num_hard_negatives: int | None = None,
        remove_accidental_hits: bool = False,
        negatives: str = "global",
        **kwargs: Any,
    ) -> None:
        # With autocast, a mixed precision policy would round probabilities, weights and labels to 16-bit floats.
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
                'Use "global" for the candidates of all replicas, or "local" for those of the query\'s replica.'
            )
        self.negatives = negatives
        # Accepts the masks of the towers (`Embedding(mask_zero=True)`) without a warning. They are not used.
        self.supports_masking = True
        self.built = True

    def call(
        self,
        query_embeddings: Any,
        candidate_embeddings: Any,
        *,
        labels: Any = None,
        sample_weight: Any = None,
        candidate_ids: Any = None,
        candidate_sampling_probability: Any = None,
        score_mask: Any = None,
        candidate_mask: Any = None,
        positive_ids: Any = None,
        negative_embeddings: Any = None,
        negative_ids: Any = None,
        negative_sampling_probability: Any = None,
    ) -> Any:
        """Computes the loss of a batch.

        All arguments after the embeddings are keyword-only, because their order is not that of TFRS.

        Args:
            query_embeddings: `[batch, embedding_dim]` float, or `[batch, num_heads, embedding_dim]` to score each
                candidate by the query's best head.
            candidate_embeddings: `[num_candidates, embedding_dim]` float, with `num_candidates >= batch`. Row i is the
                positive of query i. Rows from `batch` on are extra negatives of every query.
            labels: `[batch]` float labels of a pointwise loss. They exclude the arguments for negatives.
            sample_weight: `[batch]` float weights of the queries, finite and at least 0. While a function is traced for
                compilation, as in `fit`, the values are not known and not checked: a negative weight then raises the
                loss of its query instead of lowering it, and NaN makes the loss NaN.
            candidate_ids: `[num_candidates]` int ids, to remove accidental hits.
            candidate_sampling_probability: `[num_candidates]` float, probability that a draw is the candidate. Positive
                values are clipped to [1e-6, 1]. 0 means unknown, as for a candidate without training examples: it
                stands for one draw, `1 / n`, where n is the number of candidates of a query without padding.
            score_mask: `[batch, num_candidates]` bool; False masks the candidate for that query.
            candidate_mask: `[num_candidates]` bool; False marks padding. A padding candidate is not a negative, and the
                query of the same row has weight 0.
            positive_ids: `[batch, m]` int ids of further positives of each query, such as all that a user has watched,
                padded with -1. Candidates with these ids are not negatives of the query, in the batch and among the
                extra negatives. Row i of the candidates stays the positive of query i. Requires `candidate_ids`.
            negative_embeddings: `[batch, n, embedding_dim]` float, more negatives for each query alone, such as hard
                negatives that were mined for it.
            negative_ids: `[batch, n]` int ids of `negative_embeddings`, padded with -1. They make sure that a negative
                is none of `positive_ids`, and, with `remove_accidental_hits`, not the positive.
            negative_sampling_probability: `[batch, n]` float, as `candidate_sampling_probability`. `None` corrects none
                of these negatives: if the candidates of the batch are corrected, they count far more. 0 lets a
                negative count like one candidate of the corpus.

        Returns:
            Scalar float32 loss, or `[batch]` float32 if `loss` has no reduction.

        Raises:
            TypeError: if an argument is a dict, or ids are not integers.
            ValueError: if shapes or arguments are inconsistent, or a weight is negative or not finite.
        """
        arguments = self._prepared(
            CallArguments(
                query_embeddings,
                candidate_embeddings,
                labels=labels,
                sample_weight=sample_weight,
                candidate_ids=candidate_ids,
                candidate_sampling_probability=candidate_sampling_probability,
                score_mask=score_mask,
                candidate_mask=candidate_mask,
                positive_ids=positive_ids,
                negative_embeddings=negative_embeddings,
                negative_ids=negative_ids,
                negative_sampling_probability=negative_sampling_probability,
            )
        )
        return self._in_batch_loss(arguments) if labels is None else self._pointwise_loss(arguments)

    def labels_and_logits(self, query_embeddings: Any, candidate_embeddings: Any, **arguments: Any) -> tuple[Any, Any]:
        """Returns the labels and logits of a batch, for in-batch metrics such as the `batch_metrics` of TFRS.

        The logits are those that the loss gets, after all steps from `temperature` to hard negatives. They are stored
        as a whole, even if the loss is streamed. Padding queries have rows too: pass `candidate_mask[:batch]` to the
        metric as `sample_weight`.

        Args:
            query_embeddings: as in a call.
            candidate_embeddings: as in a call.
            **arguments: the other arguments of a call, except `labels`. `sample_weight` has no effect.

        Returns:
            One-hot labels and logits, both `[batch, num_candidates + n]` float32, with a column for each candidate and
            each of `negative_embeddings`. Masked logits are about -3.4e36. With `num_hard_negatives`, the columns are
            the positive and that many negatives. With local negatives, the candidates are those of the query's part of
            the batch and the extra negatives.

        Raises:
            TypeError: as in a call, and for symbolic tensors.
            ValueError: as in a call, and if `labels` are given.

        Example:
        ```python
        task, metric = DistributedTwoTowerTask(), keras.metrics.TopKCategoricalAccuracy(k=2)
        query_embeddings, candidate_embeddings = keras.random.normal((4, 8)), keras.random.normal((4, 8))
        metric.update_state(*task.labels_and_logits(query_embeddings, candidate_embeddings))
        ```
        """
        if arguments.get("labels") is not None:
            raise ValueError(
                "`labels_and_logits` returns the one-hot labels of the in-batch softmax. Received: `labels`. "
                "Remove them: with labels of their own, pairs have scores and no logits."
            )
        if isinstance(query_embeddings, keras.KerasTensor) or isinstance(candidate_embeddings, keras.KerasTensor):
            raise TypeError(
                "`labels_and_logits` computes with arrays. Received: symbolic tensors of a functional model. "
                "Call it in `compute_metrics` of a subclass of `keras.Model`."
            )
        prepared = self._prepared(CallArguments(query_embeddings, candidate_embeddings, **arguments))
        softmax, queries, candidates = self._in_batch_softmax(prepared)
        logits, labels = softmax.logits(queries, candidates)
        return labels, logits

    def _prepared(self, arguments: CallArguments) -> CallArguments:
        """Returns the arguments as tensors, checked, with 0 in padding rows."""
        arguments = to_tensors(arguments)
        check_arguments(arguments, self._settings_for_negatives())
        self._check_divides(arguments.query_embeddings.shape[0])
        arguments = without_padding(arguments)

        def to_float32(value: Any) -> Any:
            return None if value is None else ops.cast(value, "float32")

        return arguments._replace(
            labels=to_float32(arguments.labels),
            sample_weight=to_float32(arguments.sample_weight),
            candidate_sampling_probability=to_float32(arguments.candidate_sampling_probability),
            negative_sampling_probability=to_float32(arguments.negative_sampling_probability),
        )

    def _in_batch_loss(self, arguments: CallArguments) -> Any:
        softmax, queries, candidates = self._in_batch_softmax(arguments)
        num_queries = queries.embeddings.shape[0]
        if self.loss is None and softmax.streams(queries, candidates):
            count = losses.count_of_valid_rows(num_queries, queries.valid)
            return ops.divide(softmax.total_loss(queries, candidates), count)
        logits, one_hot = softmax.logits(queries, candidates)
        if self.loss is None:
            values = losses.softmax_cross_entropy(one_hot, logits)
            return losses.mean_over_valid_rows(values, queries.sample_weight, queries.valid)
        return _reduced(self.loss, one_hot, logits, queries.sample_weight, queries.valid)

    def _in_batch_softmax(self, arguments: CallArguments) -> tuple[InBatchSoftmax, BatchQueries, BatchCandidates]:
        queries = BatchQueries(
            comparable_queries(arguments.query_embeddings, self.similarity),
            sample_weight=arguments.sample_weight,
            score_mask=arguments.score_mask,
            valid=valid_queries(arguments),
            positive_ids=arguments.positive_ids,
        )
        if arguments.negative_embeddings is not None:
            queries = queries._replace(
                negative_embeddings=comparable_candidates(arguments.negative_embeddings, self.similarity),
                negative_sampling_probability=arguments.negative_sampling_probability,
                negative_mask=self._negative_mask(arguments),
            )
        candidates = BatchCandidates(
            comparable_candidates(arguments.candidate_embeddings, self.similarity),
            sampling_probability=arguments.candidate_sampling_probability,
            ids=arguments.candidate_ids,
            mask=arguments.candidate_mask,
        )
        num_queries = queries.embeddings.shape[0]
        softmax = InBatchSoftmax(
            temperature=self.temperature,
            remove_accidental_hits=self.remove_accidental_hits,
            num_hard_negatives=self.num_hard_negatives,
            # The size is not an int when Keras traces a model symbolically, which needs only shapes and dtypes.
            split=batch_split(num_queries) if isinstance(num_queries, int) else None,
            is_local=self.negatives == "local",
        )
        return softmax, queries, candidates

    def _negative_mask(self, arguments: CallArguments) -> Any:
        if arguments.negative_ids is None:
            return None
        own_ids = None
        if self.remove_accidental_hits:
            own_ids = arguments.candidate_ids[: ops.shape(arguments.query_embeddings)[0]]
        return batch_logits.true_negatives(arguments.negative_ids, own_ids, arguments.positive_ids)

    def _pointwise_loss(self, arguments: CallArguments) -> Any:
        scores = pairwise_scores(arguments.query_embeddings, arguments.candidate_embeddings, self.similarity)
        if self.temperature is not None:
            scores = ops.divide(scores, self.temperature)
        labels, sample_weight, valid = arguments.labels, arguments.sample_weight, valid_queries(arguments)
        if self.loss is None:
            return losses.mean_over_valid_rows(ops.square(ops.subtract(labels, scores)), sample_weight, valid)
        return _reduced(self.loss, ops.expand_dims(labels, 1), ops.expand_dims(scores, 1), sample_weight, valid)

    def _settings_for_negatives(self) -> list[str]:
        """Returns the names of the settings for negatives that differ from their defaults."""
        settings = {
            "num_hard_negatives": self.num_hard_negatives is not None,
            "remove_accidental_hits": self.remove_accidental_hits,
            "negatives": self.negatives != "global",
        }
        return [name for name, is_set in settings.items() if is_set]

    def _check_divides(self, num_queries: int | None) -> None:
        replicas = num_replicas()
        # In symbolic tracing, Keras uses placeholder sizes.
        if (
            self.negatives == "global"
            or _keras.is_tracing_symbolically()
            or num_queries is None
            or num_queries % replicas == 0
        ):
            return
        raise ValueError(
            'With `negatives="local"`, the number of replicas must divide the batch size. '
            f"Received: {num_queries} queries for {replicas} replicas. Pad the batch, for instance with "
            '`keras_rs_contrib.pad_batches`, and mark the padding in `candidate_mask`, or use `negatives="global"`.'
        )

    def compute_output_spec(
        self, query_embeddings: Any, candidate_embeddings: Any, *args: Any, **kwargs: Any
    ) -> keras.KerasTensor:
        """Returns the shape and dtype of the loss. Raises the errors of `call` about shapes and arguments."""
        bound = inspect.signature(self.call).bind(query_embeddings, candidate_embeddings, *args, **kwargs)
        bound.apply_defaults()
        check_arguments(CallArguments(**bound.arguments), self._settings_for_negatives())
        unreduced = self.loss is not None and self.loss.reduction in (None, "none")
        return keras.KerasTensor((query_embeddings.shape[0],) if unreduced else (), dtype="float32")

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: the loss has no mask."""
        return

    def get_config(self) -> dict[str, Any]:
        """Returns the serialized arguments of the constructor."""
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


def _check_temperature(temperature: float | None) -> float | None:
    if temperature is None:
        return None
    if not isinstance(temperature, numbers.Real) or isinstance(temperature, bool):
        raise TypeError(
            f"`temperature` must be a number. Received: temperature={temperature!r}. "
            "Use None to leave the scores unscaled."
        )
    if not np.finfo(np.float32).tiny <= temperature <= np.finfo(np.float32).max:
        raise ValueError(
            "`temperature` divides the scores: it must be positive, finite and in the normal range of float32. "
            f"Received: temperature={temperature!r}. Use None to leave the scores unscaled."
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
            "`num_hard_negatives` must be at least 1: without negatives the softmax loss is always 0. "
            f"Received: num_hard_negatives={num_hard_negatives}. Use None to keep all negatives."
        )
    return int(num_hard_negatives)


def _reduced(loss: keras.losses.Loss, labels: Any, predictions: Any, sample_weight: Any, valid: Any) -> Any:
    """Returns `loss` of the valid rows, with the reduction of `loss`."""
    if valid is not None:
        weight = ops.cast(valid, "float32")
        if loss.reduction in ("sum_over_batch_size", "mean"):
            # Keras divides by the number of all rows. The factor makes it the number of valid rows.
            num_rows = ops.cast(ops.shape(weight)[0], "float32")
            weight = ops.multiply(weight, ops.divide(num_rows, ops.maximum(ops.sum(weight), 1.0)))
        sample_weight = weight if sample_weight is None else ops.multiply(sample_weight, weight)
    return ops.cast(loss(labels, predictions, sample_weight=sample_weight), "float32")
