"""A whole two-tower model: towers, task, index and metrics behind `fit`, `evaluate`, `predict` and `recommend`."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import keras_rs
import numpy as np
from keras import ops
from keras.src import backend
from keras.src.trainers.data_adapters import array_slicing

from keras_rs_contrib import batches, feature_checks, losses
from keras_rs_contrib.candidate_ids import NO_CANDIDATE, check_candidate_ids
from keras_rs_contrib.checksum import checksum
from keras_rs_contrib.guards import StopWhereNoNumber, WeightsKept, with_callbacks
from keras_rs_contrib.metrics import MeanReciprocalRank, NDCGAtK, RankMetric, RecallAtK
from keras_rs_contrib.retrieval import ShardedBruteForceRetrieval, is_table, shard_candidates
from keras_rs_contrib.sampling import StreamingSamplingProbability
from keras_rs_contrib.two_tower_task import DistributedTwoTowerTask

# Queries that are embedded and searched for at once outside of `fit`, `evaluate` and `predict`.
QUERIES_AT_ONCE = 4096


class Recommendations(NamedTuple):
    """What `TwoTowerModel.recommend` returns.

    Attributes:
        ids: `[num_queries, k]` int32 candidate ids, best first; -1 where fewer than k candidates remain.
        scores: `[num_queries, k]` float32, likewise; -inf where fewer remain.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    scores: np.ndarray[Any, np.dtype[np.float32]]


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class TwoTowerModel(keras.Model):  # type: ignore[misc]
    """A two-tower retrieval model on dicts of features.

    Batches are dicts of `[batch, ...]` arrays, as arrays, `tf.data.Dataset` or `keras.utils.PyDataset`, of any size on
    any number of devices: they are filled up with rows of weight 0, which have no part in losses, metrics and
    predictions. A row whose `sample_weight` is 0 is taken as absent too: neither positive nor negative.

    Trained without `label`, each query's candidate is a positive and the other candidates of the batch, over all
    devices, are negatives. Trained with `label`, the score of each pair is compared with its label. `evaluate` gives
    the loss, and metrics over the whole corpus, where ids of candidates are known. `predict`, and a call with query
    features alone, give the top k of the index.

    An index over a feature tower is refreshed wherever it is needed and the tower has changed since: in `evaluate`,
    `predict`, `recommend`, `evaluate_queries` and saving. A direct call takes the index as it is, and checks nothing.

    What mixes the rows of a batch in training, such as batch normalization or activity regularization, sees the rows
    that fill a batch up, which repeat its last: with such towers choose batches that divide over the devices.

    Args:
        query_tower: any Keras layer or model that maps query features to `[batch, embedding_dim]`.
        candidate_tower: likewise for candidates.
        query_features: name of the query tower's feature, which it gets as a tensor; or several names, which it gets as
            a dict.
        candidate_features: likewise for candidates.
        candidate_id: name of the feature that holds the id of each candidate, as the index has it. By default, of a
            candidate tower that is an embedding, its one feature.
        label: name of the feature that holds what the scores are to be; it may also come as `y`. `None` to train on
            positives.
        task: a `DistributedTwoTowerTask`; by default a plain one.
        retrieval: what `shard_candidates` returned for the candidate tower, or a plain
            `keras_rs.layers.BruteForceRetrieval` for a tower that is an embedding; by default, for such a tower,
            `BruteForceRetrieval(k=10)`. Without an index the model only trains.
        sampling_probability: a `StreamingSamplingProbability`, for the log-q correction of in-batch softmax; it gets
            candidate ids. `None` for no correction.
        exclude_feature: name of a feature of `[batch, m]` ids that a query is not to get in `evaluate`, `predict` and
            calls, -1 for none. Batches may lack it.
        corpus_metrics: metrics of ranks for `evaluate`, such as `RecallAtK(10)`. By default recall and NDCG at the
            index's `k`, and the mean reciprocal rank; none where the list is empty.
        check_inputs: whether to look at each batch on the host, before it is used, for ids that have no row in a table
            and for numbers that are NaN or infinite, and at the loss of each epoch. Errors count rows within the batch
            as it was drawn: `shuffle=False` keeps the order of the data. A feature that a tower changes before it looks
            it up is not checked.
        **kwargs: arguments of `keras.Model`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if arguments do not fit one another. On bad batches see `check_inputs`; also where a feature is
            missing, labels come without `label`, or there is no batch at all.
        NotImplementedError: on another backend than JAX.

    Example:
    ```python
    model = TwoTowerModel(
        keras.layers.Embedding(100, 16),
        keras.layers.Embedding(50, 16),
        query_features="user_id",
        candidate_features="movie_id",
        task=DistributedTwoTowerTask(similarity="cosine", temperature=0.2, remove_accidental_hits=True),
        sampling_probability=StreamingSamplingProbability(50),
    )
    model.compile(keras.optimizers.Adam(0.01))
    model.fit({"user_id": np.arange(100), "movie_id": np.arange(100) % 50}, batch_size=32, verbose=0)
    ids, scores = model.recommend({"user_id": np.array([42, 7])}, k=3)
    ```
    """

    def __init__(
        self,
        query_tower: keras.layers.Layer,
        candidate_tower: keras.layers.Layer,
        query_features: str | Sequence[str],
        candidate_features: str | Sequence[str],
        candidate_id: str | None = None,
        label: str | None = None,
        task: DistributedTwoTowerTask | None = None,
        retrieval: keras_rs.layers.BruteForceRetrieval | None = None,
        sampling_probability: StreamingSamplingProbability | None = None,
        exclude_feature: str | None = None,
        corpus_metrics: Iterable[RankMetric] | None = None,
        check_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "jax":
            raise NotImplementedError(
                f"`TwoTowerModel` needs the JAX backend. Received: {keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        for name, tower in (("query_tower", query_tower), ("candidate_tower", candidate_tower)):
            _check_type(name, tower, keras.layers.Layer)
        task = DistributedTwoTowerTask() if task is None else task
        _check_type("task", task, DistributedTwoTowerTask)
        if task.loss is not None and task.loss.reduction in (None, "none"):
            raise ValueError(
                "The loss of the task must be one number a batch. Received: "
                f'{type(task.loss).__name__} without a reduction. Give it `reduction="sum_over_batch_size"`.'
            )
        _check_type("sampling_probability", sampling_probability, StreamingSamplingProbability, optional=True)
        _check_type("retrieval", retrieval, keras_rs.layers.BruteForceRetrieval, optional=True)
        super().__init__(**kwargs)
        self.query_tower = query_tower
        self.candidate_tower = candidate_tower
        self.query_features = _feature_names("query_features", query_features)
        self.candidate_features = _feature_names("candidate_features", candidate_features)
        for name, feature in (("candidate_id", candidate_id), ("label", label), ("exclude_feature", exclude_feature)):
            _check_type(name, feature, str, optional=True)
        self.task = task
        self.retrieval = _tied_index(retrieval, candidate_tower, task.similarity)
        if candidate_id is None and is_table(candidate_tower) and len(self.candidate_features) == 1:
            if self.retrieval is not None and self.retrieval.candidate_ids is not None:
                raise ValueError(
                    "An index with `candidate_ids` needs to know which feature holds them. Received: "
                    "candidate_id=None. Name that feature in `candidate_id`."
                )
            candidate_id = self.candidate_features[0]
        self.candidate_id = candidate_id
        self.label = label
        self.sampling_probability = sampling_probability
        self.exclude_feature = exclude_feature
        self._check_needs()
        if isinstance(corpus_metrics, RankMetric):
            corpus_metrics = [corpus_metrics]
        if corpus_metrics is None:
            k = 10 if self.retrieval is None else self.retrieval.k
            corpus_metrics = [RecallAtK(k), NDCGAtK(k), MeanReciprocalRank()]
        self.corpus_metrics = list(corpus_metrics)
        for metric in self.corpus_metrics:
            _check_type("corpus_metrics", metric, RankMetric)
        names = [metric.name for metric in self.corpus_metrics]
        if len(set(names)) < len(names):
            raise ValueError(
                f"`corpus_metrics` must have names that differ. Received: {names}. Drop one, or give it a name."
            )
        self.check_inputs = check_inputs
        # Past Keras's tracking of attributes.
        object.__setattr__(self, "_seen_features", {})
        object.__setattr__(self, "_known_lookups", {})
        if self.retrieval is not None and not self.retrieval.is_tied:
            # Of the tower as it was when the index was refreshed last, 0 where that is not known. Saved with the model,
            # so that one that is trained further knows that its index is stale.
            self.tower_checksum = self.add_weight(
                shape=(2,), initializer="zeros", dtype="uint32", trainable=False, autocast=False, name="tower_checksum"
            )

    def _check_needs(self) -> None:
        about_negatives = [
            name
            for name, given in (
                ("sampling_probability", self.sampling_probability is not None),
                ("remove_accidental_hits", self.task.remove_accidental_hits),
                ("num_hard_negatives", self.task.num_hard_negatives is not None),
            )
            if given
        ]
        if self.label is not None and about_negatives:
            raise ValueError(
                "With `label` each query scores its own candidate only: there are no negatives. Received: `label` "
                f"together with {', '.join(f'`{name}`' for name in about_negatives)}. Drop the one or the other."
            )
        if self.candidate_id is not None:
            return
        if self.task.remove_accidental_hits:
            needs = "a task with `remove_accidental_hits=True`"
        elif self.sampling_probability is not None:
            needs = "`sampling_probability`"
        else:
            return
        raise ValueError(
            f"The ids of candidates are needed. Received: {needs}, and candidate_id=None. "
            "Name the feature that holds the ids in `candidate_id`."
        )

    # Keras's own entry points, on batches that are checked and filled up.

    def compile(
        self,
        optimizer: Any = "rmsprop",
        *,
        metrics: Sequence[Any] | None = None,
        weighted_metrics: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Configures the training: see `keras.Model.compile`.

        Args:
            optimizer: as of `keras.Model.compile`.
            metrics: metrics of labels and scores, for a model with `label`. Rows that fill a batch up are in no metric,
                and so each gets the sample weights.
            weighted_metrics: likewise.
            **kwargs: further arguments of `keras.Model.compile`, but for `loss`, which the task has.

        Raises:
            ValueError: if a loss is given, or metrics of labels without `label`, or metrics of ranks.
        """
        if kwargs.get("loss") is not None or kwargs.get("loss_weights") is not None:
            raise ValueError(
                "The loss is that of the task. Received: a loss in `compile`. "
                "Pass `task=DistributedTwoTowerTask(loss=...)` to the model."
            )
        all_metrics = [*(metrics or []), *(weighted_metrics or [])]
        if any(isinstance(metric, RankMetric) for metric in all_metrics):
            raise ValueError(
                "The metrics of `compile` compare labels with scores. Received: one of ranks. "
                "Pass it to the model as `corpus_metrics`."
            )
        if all_metrics and self.label is None:
            raise ValueError(
                "The metrics of `compile` compare labels with scores. Received: metrics for a model without `label`. "
                "Name the feature that holds labels in `label`, or pass metrics of ranks as `corpus_metrics`."
            )
        super().compile(optimizer, weighted_metrics=all_metrics or None, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model as it was when it was saved."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | list[int] = 1,
    ) -> keras.callbacks.History:
        """Trains the model: see `keras.Model.fit`.

        Raises:
            ValueError: if a batch is bad, or the loss of an epoch no number; the progress until then is in
                `model.history`.
        """
        x = self._to_arrays(x, y)
        if class_weight is not None and isinstance(x, dict) and y is None:
            raise ValueError(
                "`class_weight` weighs the classes of `y`. Received: `class_weight`, and y=None. "
                "Pass the labels as `y`, or the weights as `sample_weight`."
            )
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = array_slicing.train_validation_split(
                (x, y, sample_weight), validation_split=validation_split
            )
        shuffle = shuffle and not hasattr(x, "element_spec")
        x = self._batches(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            steps=steps_per_epoch,
            shuffle=shuffle,
            class_weight=class_weight,
        )
        if validation_data is not None:
            self._check_can_refresh()
            validation_data = self._batches(
                *keras.utils.unpack_x_y_sample_weight(validation_data),
                batch_size=validation_batch_size or batch_size,
                steps=validation_steps,
            )
        stop = StopWhereNoNumber()
        with WeightsKept(self) as kept:
            history = super().fit(
                x,
                epochs=epochs,
                verbose=verbose,
                callbacks=with_callbacks(callbacks, stop, kept),
                validation_data=validation_data,
                shuffle=False,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_freq=validation_freq,
            )
        if self.check_inputs and stop.found is not None:
            raise ValueError(self._no_number(*stop.found))
        return history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Returns the loss and the metrics over the whole corpus: see `keras.Model.evaluate`.

        Raises:
            ValueError: if a batch is bad, or the loss no number.
        """
        if self._ranks_in_evaluation:
            self.refresh_index()
        within_fit = kwargs.get("_use_cached_eval_dataset", False)
        if not within_fit:
            x = self._batches(x, y, sample_weight, batch_size=batch_size, steps=steps)
            with WeightsKept(self) as kept:
                logs = super().evaluate(
                    x, verbose=verbose, steps=steps, callbacks=with_callbacks(callbacks, kept), return_dict=True
                )
        else:
            logs = super().evaluate(x, steps=steps, callbacks=callbacks, return_dict=True, **kwargs)
        if self.check_inputs and not within_fit and not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(self._no_number("loss", logs["loss"], None))
        return logs if return_dict else self._flatten_metrics_in_order(logs)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Returns the top k of each row, as the index does: see `keras.Model.predict`.

        Args:
            x: batches with the query features; others are left out, but for `exclude_feature`.
            batch_size: as of `keras.Model.predict`, as what follows.
            verbose: likewise.
            steps: likewise.
            callbacks: likewise.

        Returns:
            `(scores, ids)`, `[num_queries, k]` float32 and int32 NumPy arrays, or the ids alone.

        Raises:
            ValueError: if a batch is bad, or the model has no index.
        """
        self.refresh_index()
        x, _, _ = keras.utils.unpack_x_y_sample_weight(x)
        x = self._batches(x, batch_size=batch_size, steps=steps, queries_only=True)
        with WeightsKept(self) as kept:
            outputs = super().predict(x, verbose=verbose, steps=steps, callbacks=with_callbacks(callbacks, kept))
        is_padded = x.is_padded(len(keras.tree.flatten(outputs)[0]))
        if not is_padded.any():
            return outputs
        return keras.tree.map_structure(lambda output: output[~is_padded], outputs)

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """Trains on one batch: see `keras.Model.train_on_batch`."""
        if class_weight is not None:
            raise ValueError(
                "`class_weight` is not supported on single batches. Received: one. Pass the weights as `sample_weight`."
            )
        x, y, sample_weight = self._batch(x, y, sample_weight)
        return super().train_on_batch(x, y, sample_weight, return_dict=return_dict)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """Evaluates one batch: see `keras.Model.test_on_batch`."""
        self.refresh_index()
        x, y, sample_weight = self._batch(x, y, sample_weight)
        return super().test_on_batch(x, y, sample_weight, return_dict=return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """Returns the top k of one batch: see `predict`."""
        self.refresh_index()
        num_rows = batches.batch_length(x)
        x, _, _ = self._batch(x, queries_only=True)
        return keras.tree.map_structure(lambda output: output[:num_rows], super().predict_on_batch(x))

    # What a step does. To override as of any `keras.Model`.

    def call(self, features: dict[str, Any], training: bool | None = None) -> Any:
        """Embeds a batch, or retrieves for it.

        Args:
            features: dict of `[batch, ...]` arrays.
            training: whether the towers train.

        Returns:
            With query features alone, what the index returns. With candidate features too, a dict of
            `query_embeddings` and `candidate_embeddings`, and, outside of training, where ids, an index and
            `corpus_metrics` are there, the `ranks` of the candidates in the whole corpus, `[batch]` int32.

        Raises:
            TypeError: if `features` is no dict.
            ValueError: if features are missing, or the model has no index to retrieve from.
        """
        self._check_names(features, self.query_features)
        self._note_features(features)
        query_embeddings = self.query_tower(_select(features, self.query_features), training=training)
        exclude_ids = self._exclude_ids(features)
        if not any(name in features for name in self.candidate_features):
            return self._index()(query_embeddings, exclude_ids=exclude_ids)
        self._check_names(features, self.candidate_features)
        candidate_embeddings = self.candidate_tower(_select(features, self.candidate_features), training=training)
        result = {"query_embeddings": query_embeddings, "candidate_embeddings": candidate_embeddings}
        if self.retrieval is not None and not self.retrieval.built:
            # Also where nothing below calls it: Keras wants all layers built by the first batch.
            self.retrieval.build(query_embeddings.shape)
        if training or self.retrieval is None or self.candidate_id is None or not self.corpus_metrics:
            return result
        self._check_names(features, [self.candidate_id])
        result["ranks"] = self.retrieval.ranks(query_embeddings, features[self.candidate_id], exclude_ids)
        return result

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Returns the loss of the task, and what the layers add to it, such as regularization.

        Args:
            x: the batch.
            y: labels, where `x` does not hold them.
            y_pred: what `call` returned.
            sample_weight: `[batch]`; a row of weight 0 is absent.
            training: whether the batch counts for `sampling_probability`.
        """
        labels = self._labels(x, y)
        candidate_mask = None if sample_weight is None else ops.not_equal(sample_weight, 0)
        arguments = {}
        if labels is None and self.task.remove_accidental_hits:
            arguments["candidate_ids"] = x[self.candidate_id]
        if labels is None and self.sampling_probability is not None:
            arguments["candidate_sampling_probability"] = self.sampling_probability(
                x[self.candidate_id], candidate_mask=candidate_mask, training=training
            )
        loss = self.task(
            y_pred["query_embeddings"],
            y_pred["candidate_embeddings"],
            labels=labels,
            sample_weight=sample_weight,
            candidate_mask=candidate_mask,
            **arguments,
        )
        for added in self.losses:
            loss = ops.add(loss, ops.sum(ops.cast(added, loss.dtype)))
        return loss

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the metrics, and returns those that a batch of this kind has.

        Args:
            x: the batch.
            y: labels, where `x` does not hold them.
            y_pred: what `call` returned.
            sample_weight: `[batch]`.
        """
        has_ranks = "ranks" in y_pred
        if has_ranks:
            for metric in self.corpus_metrics:
                metric.update_state(y_pred["ranks"], sample_weight=sample_weight)
        labels = scores = None
        if self._compile_metrics is not None:
            labels = ops.expand_dims(self._labels(x, y), 1)
            scores = losses.pairwise_scores(
                y_pred["query_embeddings"], y_pred["candidate_embeddings"], self.task.similarity
            )
            scores = ops.expand_dims(ops.divide(scores, self.task.temperature or 1.0), 1)
        result: dict[str, Any] = super().compute_metrics(x, labels, scores, sample_weight)
        if not has_ranks:
            # They would be reported as 0.
            for metric in self.corpus_metrics:
                result.pop(metric.name, None)
        return result

    def _update_metrics_variables(
        self, metrics_variables: Any, unscaled_loss: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any
    ) -> tuple[dict[str, Any], list[Any]]:
        # As in Keras, but that the loss of a batch, a mean, weighs as many rows as it is the mean of.
        mapping = list(zip(self.metrics_variables, metrics_variables, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            if sample_weight is None:
                num_rows = batches.batch_length(x)
            else:
                num_rows = ops.sum(ops.cast(ops.not_equal(sample_weight, 0), "float32"))
            self._loss_tracker.update_state(unscaled_loss, sample_weight=num_rows)
            logs = self.compute_metrics(x, y, y_pred, sample_weight)
        values = [scope.get_current_value(variable) for variable in self.metrics_variables]
        return logs, [old if new is None else new for new, old in zip(values, metrics_variables, strict=True)]

    # Retrieval outside of Keras's entry points.

    def recommend(
        self,
        query_features: dict[str, Any],
        k: int | None = None,
        exclude_ids: Any = None,
        verbose: int | str = "auto",
    ) -> Recommendations:
        """Returns the best candidates for each query.

        Args:
            query_features: dict of `[num_queries, ...]` arrays.
            k: how many candidates; by default as many as the index returns.
            exclude_ids: `[num_queries, m]` ints, candidates that a query is not to get, -1 for none;
                `group_candidate_ids` makes them. By default `exclude_feature`, if the features hold it.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one where there are many queries.

        Returns:
            `Recommendations(ids, scores)`.

        Raises:
            TypeError: if `exclude_ids` are no integers.
            ValueError: if features are missing or bad, `k` is more than there are candidates, or shapes do not fit.
        """
        index = self._index()
        k = index.k if k is None else k

        def find(queries: Any, exclude_ids: Any) -> tuple[Any, Any]:
            scores, ids = index.find(queries, k, exclude_ids)
            return ids, scores

        ids, scores = self._search(find, query_features, exclude_ids, verbose)
        return Recommendations(ids, scores)

    def evaluate_queries(
        self,
        query_features: dict[str, Any],
        positive_ids: Any,
        exclude_ids: Any = None,
        metrics: Iterable[RankMetric] | None = None,
        verbose: int | str = "auto",
    ) -> dict[str, float]:
        """Returns the corpus metrics of queries with several positives, such as the films a user has yet to watch.

        `evaluate` takes each pair of a query and a positive for itself; here each query has one list, in which its
        positives stand together, and counts once.

        Args:
            query_features: dict of `[num_queries, ...]` arrays.
            positive_ids: `[num_queries, m]` ints, -1 for none; a query without any does not count.
                `group_candidate_ids` makes them.
            exclude_ids: `[num_queries, n]` ints, candidates that a query is not to get, such as those it has seen in
                training, -1 for none. By default `exclude_feature`, if the features hold it.
            metrics: metrics of ranks, whose state is left alone; by default the model's `corpus_metrics`.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one where there are many queries.

        Returns:
            The value of each of the metrics, by name.

        Raises:
            TypeError: if ids are no integers.
            ValueError: if features are missing or bad, a positive is no candidate, or shapes do not fit.
        """
        index = self._index()
        self._check_names(query_features, self.query_features)
        positive_ids = check_candidate_ids(positive_ids, "positive_ids")
        num_queries = len(np.atleast_1d(np.asarray(query_features[self.query_features[0]])))
        if positive_ids.ndim != 2 or len(positive_ids) != num_queries:
            raise ValueError(
                f"`positive_ids` needs a row for each query. Received: shape {positive_ids.shape} for {num_queries} "
                "queries. Make the rows with `group_candidate_ids`."
            )
        if not (positive_ids != NO_CANDIDATE).any():
            raise ValueError(
                "`positive_ids` needs at least one positive. Received: none. Check what is held out, and the queries."
            )
        positive_ids = _each_once(positive_ids)

        def ranks(queries: Any, exclude_ids: Any, positive_ids: Any) -> tuple[Any]:
            return (index.ranks(queries, positive_ids, exclude_ids),)

        (all_ranks,) = self._search(ranks, query_features, exclude_ids, verbose, positive_ids)
        result = {}
        for metric in self.corpus_metrics if metrics is None else metrics:
            _check_type("metrics", metric, RankMetric)
            metric = type(metric).from_config(metric.get_config())
            metric.update_state(all_ranks)
            result[metric.name] = float(metric.result())
        return result

    def refresh_index(self) -> None:
        """Refreshes the index over a feature tower, if the tower has changed since.

        Raises:
            ValueError: if it has, in a model that was loaded, whose index does not have the tower's inputs.
        """
        index = self.retrieval
        if index is None or index.is_tied:
            return
        # Without the state of random generators, which has no part in inference.
        now = checksum(self.candidate_tower.weights)
        known = ops.convert_to_numpy(self.tower_checksum)
        if np.array_equal(known, now):
            return
        if index.has_candidates:
            index.refresh()
        elif known.any():
            raise ValueError(
                "The candidate tower has changed since the index was made, and the index does not have the tower's "
                "inputs, which are not saved with it. Received: a stale index. "
                "Pass them: `model.retrieval.refresh(candidates)`."
            )
        self.tower_checksum.assign(now)

    @property
    def _ranks_in_evaluation(self) -> bool:
        return self.retrieval is not None and self.candidate_id is not None and bool(self.corpus_metrics)

    def _check_can_refresh(self) -> None:
        index = self.retrieval
        if self._ranks_in_evaluation and not index.is_tied and not index.has_candidates:  # type: ignore[union-attr]
            raise ValueError(
                "To validate while the candidate tower is trained, the index needs the tower's inputs for the whole "
                "corpus. Received: a model whose index has none: they are not saved with it. "
                "Pass them first: `model.retrieval.refresh(candidates)`."
            )

    # Saving.

    def save_own_variables(self, store: Any) -> None:
        """Saves the model's own weights, with an index that is up to date where it can be."""
        if self.retrieval is not None and not self.retrieval.is_tied and self.retrieval.has_candidates:
            try:
                self.refresh_index()
            except ValueError as error:
                # What has been trained is not to be lost over it.
                warnings.warn(f"The model is saved with an index that is not up to date. {error}", stacklevel=2)
        super().save_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized."""
        config: dict[str, Any] = super().get_config()
        serialize = keras.saving.serialize_keras_object
        config.update(
            query_tower=serialize(self.query_tower),
            candidate_tower=serialize(self.candidate_tower),
            query_features=self.query_features,
            candidate_features=self.candidate_features,
            candidate_id=self.candidate_id,
            label=self.label,
            task=serialize(self.task),
            retrieval=None if self.retrieval is None else serialize(self.retrieval),
            sampling_probability=None if self.sampling_probability is None else serialize(self.sampling_probability),
            exclude_feature=self.exclude_feature,
            corpus_metrics=[serialize(metric) for metric in self.corpus_metrics],
            check_inputs=self.check_inputs,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TwoTowerModel:
        """Returns the model that `get_config` describes."""
        config = dict(config)
        deserialize = keras.saving.deserialize_keras_object
        index = config.get("retrieval")
        for name in ("query_tower", "candidate_tower", "task", "retrieval", "sampling_probability"):
            if isinstance(config.get(name), dict):
                config[name] = deserialize(config[name])
        if isinstance(index, dict) and config["retrieval"].candidate_tower is not config["candidate_tower"]:
            # Outside of a file, each occurrence of a layer becomes a layer of its own.
            layer = type(config["retrieval"])
            config["retrieval"] = layer.from_config({**index["config"], "candidate_tower": config["candidate_tower"]})
            config["retrieval"].build_from_config(index.get("build_config"))
        if config.get("corpus_metrics") is not None:
            config["corpus_metrics"] = [
                deserialize(metric) if isinstance(metric, dict) else metric for metric in config["corpus_metrics"]
            ]
        return cls(**config)

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns shape and dtype of each feature that the model has seen."""
        return {"features": self._seen_features} if self._seen_features else None

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the towers for the features that the model had seen."""
        features = config.get("features", {})
        if all(name in features for name in self.query_features):
            self({name: keras.KerasTensor((1, *shape), dtype) for name, (shape, dtype) in features.items()})

    def _note_features(self, features: dict[str, Any]) -> None:
        used = [*self.query_features, *self.candidate_features, self.candidate_id]
        for name in used:
            if name in features and name not in self._seen_features:
                dtype = keras.backend.standardize_dtype(features[name].dtype)
                self._seen_features[name] = (tuple(features[name].shape[1:]), dtype)

    # Checks.

    def _batches(
        self, x: Any, y: Any = None, sample_weight: Any = None, *, queries_only: bool = False, **how: Any
    ) -> Any:
        """Returns batches that are checked, stripped of what JAX cannot hold, and filled up."""
        prepare = functools.partial(self._prepare, self._corpus_ids(queries_only), queries_only)
        x = self._to_arrays(x, y, queries_only)
        y, sample_weight = (np.asarray(each) if isinstance(each, list) else each for each in (y, sample_weight))
        return batches.padded_batches(x, y, sample_weight, prepare=prepare, **how)

    def _to_arrays(self, x: Any, y: Any, queries_only: bool = False) -> Any:
        """Returns features in the form in which Keras makes batches of them."""
        if not isinstance(x, dict):
            return x
        x = {name: np.asarray(values) if isinstance(values, list) else values for name, values in x.items()}
        # Keras stumbles over strings in arrays.
        return feature_checks.without_strings(x, self._needed(queries_only, y))

    def _batch(self, x: Any, y: Any = None, sample_weight: Any = None, queries_only: bool = False) -> Any:
        """Returns one batch, likewise."""
        x, y, sample_weight = self._prepare(self._corpus_ids(queries_only), queries_only, 0, x, y, sample_weight)
        size = batches.batch_length((x, y, sample_weight))
        return batches.pad(x, y, sample_weight, size, batches.padded_size(size))

    def _prepare(
        self,
        corpus_ids: dict[str, feature_checks.AllowedIds],
        queries_only: bool,
        number: int,
        x: Any,
        y: Any,
        sample_weight: Any,
    ) -> tuple[Any, Any, Any]:
        needed = self._needed(queries_only, y)
        self._check_names(x, needed)
        if queries_only:
            x = {name: x[name] for name in [*needed, self.exclude_feature] if name in x}
        else:
            self._labels(x, y)
        x = feature_checks.without_strings(x, needed)
        batches.batch_length((x, y, sample_weight))
        if self.check_inputs:
            features = {name: x[name] for name in needed}
            named = {f"The feature {name!r}": values for name, values in features.items()}
            feature_checks.check_numbers(
                number, {**named, **_named("`y`", y), **_named("`sample_weight`", sample_weight)}
            )
            feature_checks.check_ids(number, features, corpus_ids)
            feature_checks.check_ids(number, features, self._lookups(features))
        return x, y, sample_weight

    def _needed(self, queries_only: bool, y: Any) -> list[str]:
        """Returns the features that a batch must hold."""
        names: list[str | None] = list(self.query_features)
        if not queries_only:
            names += [*self.candidate_features, self.candidate_id, self.label if y is None else None]
        return [name for name in dict.fromkeys(names) if name is not None]

    def _corpus_ids(self, queries_only: bool) -> dict[str, feature_checks.AllowedIds]:
        """Returns which ids of candidates the index and the sampling probability know."""
        if queries_only or not self.check_inputs or self.candidate_id is None:
            return {}
        allowed = []
        if self.sampling_probability is not None:
            allowed.append(feature_checks.AllowedIds(self.sampling_probability.num_candidates, "sampling_probability"))
        if self.retrieval is not None and self.retrieval.candidate_ids is not None:
            ids = np.sort(ops.convert_to_numpy(self.retrieval.candidate_ids))
            allowed.append(feature_checks.AllowedIds(len(ids), "the index", ids))
        elif self.retrieval is not None and self.retrieval.num_candidates is not None:
            allowed.append(feature_checks.AllowedIds(self.retrieval.num_candidates, "the index"))
        # An index with ids of its own says the most, and otherwise the smaller table.
        return {self.candidate_id: min(allowed, key=lambda a: (a.ids is None, a.num_rows))} if allowed else {}

    def _lookups(self, features: dict[str, Any]) -> dict[str, feature_checks.AllowedIds]:
        """Returns which features are looked up in tables of the towers, found out once for each tower."""
        for tower, names in ((self.query_tower, self.query_features), (self.candidate_tower, self.candidate_features)):
            if tower.path in self._known_lookups or not all(name in features for name in names):
                continue
            if not all(layer.built for layer in tower._flatten_layers()):
                specs = {name: keras.KerasTensor(array.shape, array.dtype) for name, array in features.items()}
                backend.compute_output_spec(self, specs, training=False)
            selected = {name: features[name] for name in names}
            self._known_lookups[tower.path] = feature_checks.looked_up_features(tower, selected, len(names) == 1)
        return {name: ids for lookups in self._known_lookups.values() for name, ids in lookups.items()}

    def _check_names(self, features: Any, names: Iterable[str]) -> None:
        if not isinstance(features, dict):
            raise TypeError(
                "A batch must be a dict of features. Received: "
                f"{type(features).__name__}. Name its arrays, such as {{{self.query_features[0]!r}: ...}}."
            )
        missing = [name for name in names if name not in features]
        if missing:
            raise ValueError(
                f"A batch must hold the features {list(names)}. Received: {sorted(features)}, without "
                f"{missing[0]!r}. Add it, or name the features of the model otherwise."
            )

    def _labels(self, x: Any, y: Any) -> Any:
        if self.label is None:
            if y is not None:
                raise ValueError(
                    "A model without `label` trains on positives and has no use for labels. Received: `y`. "
                    "Drop it, or pass `label=` with the name of the feature that holds the labels."
                )
            return None
        if y is not None and self.label in x:
            raise ValueError(
                f"Labels come as a feature or as `y`. Received: the feature {self.label!r} and `y`. Drop one of them."
            )
        labels = x[self.label] if y is None else y
        # Keras's own losses take both.
        return labels[:, 0] if len(labels.shape) == 2 and labels.shape[1] == 1 else labels

    def _exclude_ids(self, features: dict[str, Any]) -> Any:
        return None if self.exclude_feature is None else features.get(self.exclude_feature)

    def _index(self) -> ShardedBruteForceRetrieval:
        if self.retrieval is None:
            raise ValueError(
                "Retrieval needs an index. Received: a model without one, over a candidate tower that is no embedding. "
                "Pass `retrieval=shard_candidates(BruteForceRetrieval(k=10), candidate_tower, candidates=...)`."
            )
        return self.retrieval

    def _search(
        self, function: Any, features: dict[str, Any], exclude_ids: Any, verbose: int | str, *arrays: Any
    ) -> list[np.ndarray[Any, Any]]:
        """Returns what `function` does for the embeddings of the queries, some of them at a time."""
        self.refresh_index()
        self._check_names(features, self.query_features)
        features = {name: np.asarray(values) for name, values in features.items()}
        features, _, _ = self._prepare({}, True, 0, features, None, None)
        num_queries = batches.batch_length(features)
        if exclude_ids is None:
            exclude_ids = self._exclude_ids(features)
        if exclude_ids is not None:
            exclude_ids = check_candidate_ids(exclude_ids, "exclude_ids")
            if exclude_ids.ndim != 2 or len(exclude_ids) != num_queries:
                raise ValueError(
                    "`exclude_ids` needs a row for each query. Received: "
                    f"shape {exclude_ids.shape} for {num_queries} queries. Make the rows with `group_candidate_ids`."
                )
        inputs = _select(features, self.query_features)
        if verbose == "auto":
            verbose = int(num_queries > 16 * QUERIES_AT_ONCE)
        progress = keras.utils.Progbar(num_queries, verbose=verbose, unit_name="query")
        parts = []
        # At least once, for the shapes of the result.
        for start in range(0, max(num_queries, 1), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            part = keras.tree.map_structure(lambda array, rows=rows: np.asarray(array)[rows], inputs)
            queries = self.query_tower(part, training=False)
            excluded = None if exclude_ids is None else exclude_ids[rows]
            results = function(queries, excluded, *(array[rows] for array in arrays))
            parts.append([np.asarray(result) for result in results])
            progress.update(min(start + QUERIES_AT_ONCE, num_queries))
        return [np.concatenate(results) for results in zip(*parts, strict=True)]

    def _no_number(self, name: str, value: float, epoch: int | None) -> str:
        """Returns what to say where a loss is no number."""
        where = "" if epoch is None else f" in epoch {epoch + 1}"
        for variable in self.trainable_variables:
            values = ops.convert_to_numpy(variable.value)
            finite = np.isfinite(values).reshape(len(values) if values.ndim else 1, -1).all(axis=1)
            if not finite.all():
                rows = np.flatnonzero(~finite)
                place = f"{len(rows)} of {len(finite)} rows of {variable.path!r}, such as row {rows[0]}, are no numbers"
                break
        else:
            place = "all weights are numbers"
        return (
            f"The loss must be a number. Received: {name}={value}{where}; {place}. Lower the learning rate, and look "
            "for NaN and infinity in the features, the labels and the sample weights, and for ids without a row."
        )


def _each_once(ids: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns `[num_rows, n]` ids with -1 in place of all but one of those that are equal within a row."""
    ids = np.sort(ids, axis=1)
    again = np.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)))
    return np.where(again, np.int32(NO_CANDIDATE), ids)


def _named(name: str, values: Any) -> dict[str, Any]:
    return {} if values is None else {name: np.asarray(values)}


def _check_type(name: str, value: Any, kind: type, optional: bool = False) -> None:
    if isinstance(value, kind) or (optional and value is None):
        return
    raise TypeError(
        f"`{name}` must be a `{kind.__name__}`. Received: {value!r} (of type {type(value).__name__}). Pass one."
    )


def _feature_names(argument: str, names: str | Sequence[str]) -> list[str]:
    result = [names] if isinstance(names, str) else list(names) if isinstance(names, (list, tuple)) else []
    if not result or not all(isinstance(name, str) for name in result):
        raise TypeError(
            f"`{argument}` must be the name of a feature, or several. Received: {names!r}. Pass the keys of the batch."
        )
    return result


def _select(features: dict[str, Any], names: list[str]) -> Any:
    return features[names[0]] if len(names) == 1 else {name: features[name] for name in names}


def _tied_index(
    retrieval: keras_rs.layers.BruteForceRetrieval | None, candidate_tower: keras.layers.Layer, similarity: str
) -> ShardedBruteForceRetrieval | None:
    """Returns the index of the candidate tower."""
    if retrieval is None:
        if not is_table(candidate_tower):
            return None
        retrieval = keras_rs.layers.BruteForceRetrieval(k=min(10, candidate_tower.input_dim))
    if not isinstance(retrieval, ShardedBruteForceRetrieval):
        return shard_candidates(retrieval, candidate_tower, similarity=similarity)
    if retrieval.candidate_tower is not candidate_tower:
        raise ValueError(
            "The index must be that of the model's candidate tower. Received: "
            f"an index of {retrieval.candidate_tower.name!r} and the tower {candidate_tower.name!r}. "
            "Pass the same layer to both."
        )
    if retrieval.similarity != similarity:
        raise ValueError(
            "The index must rank by the similarity that is trained. Received: "
            f"similarity={retrieval.similarity!r} in the index and {similarity!r} in the task. Pass the same to both."
        )
    return retrieval
