"""The loss and the metrics of a batch of a two-tower model."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rs_contrib import batches, scores
from keras_rs_contrib.model.exporting import ExportingModel
from keras_rs_contrib.model.feature_names import flat
from keras_rs_contrib.negatives.mixed import MixedNegatives
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability
from keras_rs_contrib.task.two_tower_task import DistributedTwoTowerTask


class ModelWithObjective(ExportingModel):
    """A model whose task computes the loss of a batch, and which updates metrics of ranks, of logits and of labels.

    Attributes:
        task: computes the loss. Set by the constructor of a subclass, like all attributes.
        label: name of the feature with labels, or `None`.
        sampling_probability: estimates the probabilities of candidates, or `None`.
        mixed_negatives: draws more negatives, or `None`.
        batch_metrics: metrics of the logits of a batch.
        corpus_positives: which rows are positives in `corpus_metrics`.
    """

    task: DistributedTwoTowerTask
    label: str | None
    sampling_probability: StreamingSamplingProbability | None
    mixed_negatives: MixedNegatives | None
    batch_metrics: list[keras.metrics.Metric]
    corpus_positives: float | str | None
    _has_label_metrics: bool = False

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Returns the loss of the task plus the losses that layers add, such as regularization.

        Args:
            x: dict of `[batch, ...]` features.
            y: `[batch]` labels, if `x` does not hold them.
            y_pred: the result of `call`.
            sample_weight: `[batch]` float; a row of weight 0 is absent.
            training: whether `sampling_probability` counts the batch, and `cross_batch_memory` keeps it.
        """
        labels = self.model_inputs.names.labels(x, y)
        candidate_mask = None if sample_weight is None else batches.is_present(sample_weight)
        candidates = self._candidates(x, y_pred, candidate_mask, training)
        loss = self.task(y_pred["query_embeddings"], labels=labels, sample_weight=sample_weight, **candidates)
        if self.batch_metrics:
            # For `compute_metrics`, which cannot read the state of the layers.
            batch = self.task.labels_and_logits(y_pred["query_embeddings"], **candidates)
            y_pred["batch_labels"], y_pred["batch_logits"] = map(ops.stop_gradient, batch)
        for added in self.losses:
            loss = ops.add(loss, ops.sum(ops.cast(added, loss.dtype)))
        return loss

    def _candidates(self, x: Any, y_pred: Any, candidate_mask: Any, training: bool) -> dict[str, Any]:
        """Returns the task's arguments for the candidates of the batch, and for other positives and negatives."""
        result = {"candidate_embeddings": y_pred["candidate_embeddings"], "candidate_mask": candidate_mask}
        if self.candidate_id is None or self.label is not None:
            return result
        ids = flat(x[self.candidate_id])
        names = self.model_inputs.names
        has_positives = names.positives is not None and names.positives in x
        if self.task.remove_accidental_hits or self.cross_batch_memory is not None or has_positives:
            result["candidate_ids"] = ids
        if self.sampling_probability is not None:
            result["candidate_sampling_probability"] = self.sampling_probability(
                ids, candidate_mask=candidate_mask, training=training
            )
        if self.mixed_negatives is not None:
            if "drawn_ids" in y_pred:
                drawn = self.mixed_negatives.with_drawn(ids, y_pred["drawn_ids"], candidate_mask)
            else:
                drawn = self.mixed_negatives(ids, candidate_mask=candidate_mask, training=False)
            result.update(drawn._asdict())
        if self.cross_batch_memory is not None:
            result = self.cross_batch_memory(**result, training=training)._asdict()
        if has_positives:
            result["positive_ids"] = ops.cast(x[names.positives], "int32")
        if "negative_embeddings" in y_pred:
            result["negative_embeddings"] = y_pred["negative_embeddings"]
            result["negative_ids"] = ops.cast(x[names.negatives], "int32")
            result["negative_sampling_probability"] = x.get(names.negative_probability)
        return result

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the metrics, and returns those that apply to the batch: rank metrics only if it has ranks.

        Args:
            x: dict of `[batch, ...]` features.
            y: `[batch]` labels, if `x` does not hold them.
            y_pred: the result of `call`.
            sample_weight: `[batch]` float; a row of weight 0 is absent.
        """
        has_ranks = "ranks" in y_pred
        if has_ranks:
            weight = self._weight_of_positives(x, y, sample_weight)
            for metric in self.corpus_metrics:
                metric.update_state(y_pred["ranks"], sample_weight=weight)
        if "batch_logits" in y_pred:
            for metric in self.batch_metrics:
                metric.update_state(y_pred["batch_labels"], y_pred["batch_logits"], sample_weight=sample_weight)
        labels = predictions = None
        if self._has_label_metrics:
            labels = ops.expand_dims(self.model_inputs.names.labels(x, y), 1)
            predictions = scores.pairwise_scores(
                y_pred["query_embeddings"], y_pred["candidate_embeddings"], self.task.similarity
            )
            predictions = ops.expand_dims(ops.divide(predictions, self.task.temperature or 1.0), 1)
        result: dict[str, Any] = super().compute_metrics(x, labels, predictions, sample_weight)
        if not has_ranks:
            # Keras would report them as 0.
            for metric in self.corpus_metrics:
                result.pop(metric.name, None)
        return result

    def _weight_of_positives(self, x: Any, y: Any, sample_weight: Any) -> Any:
        """Returns the weight of each row in the rank metrics, 0 for rows that are not positives."""
        if isinstance(self.corpus_positives, str):
            weight = flat(x[self.corpus_positives])
        elif self.label is None:
            return sample_weight
        else:
            labels = self.model_inputs.names.labels(x, y)
            least = self.corpus_positives
            weight = ops.greater(labels, 0) if least is None else ops.greater_equal(labels, least)
        weight = ops.cast(weight, "float32")
        return weight if sample_weight is None else ops.multiply(weight, sample_weight)
