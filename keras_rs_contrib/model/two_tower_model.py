"""A complete two-tower model: towers, task, index and metrics behind `fit`, `evaluate`, `predict` and `recommend`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import keras_rs
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import check_type, explains_keywords
from keras_rs_contrib.metrics import RankMetric
from keras_rs_contrib.model import checksums
from keras_rs_contrib.model.access import Access
from keras_rs_contrib.model.configuration import (
    check_corpus_positives,
    check_drawn_ids,
    check_needs,
    check_optimizer_of_tables,
    check_task,
    default_sampling,
    default_task,
    feature_of_ids,
    fit_to_vocabulary,
    index_of_tower,
    metrics_of_batch,
    metrics_of_corpus,
)
from keras_rs_contrib.model.feature_names import POPULAR_RANKS, feature_names, flat
from keras_rs_contrib.model.inputs import ModelInputs
from keras_rs_contrib.model.lookups import TowerLookups
from keras_rs_contrib.model.objective import ModelWithObjective
from keras_rs_contrib.model.shared_layers import copy_of_config, deserialize_tower, shared_layers
from keras_rs_contrib.model.towers import TowerCandidates, check_tower, embed_with_joined_lookups, embeddings_of
from keras_rs_contrib.model.training_data import TrainingData
from keras_rs_contrib.model.vocabularies import (
    Skipped,
    check_action,
    check_vocabularies,
    config_of_vocabularies,
    vocabularies_of_config,
)
from keras_rs_contrib.negatives.memory import CrossBatchMemory
from keras_rs_contrib.negatives.mixed import MixedNegatives
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability
from keras_rs_contrib.task.two_tower_task import DistributedTwoTowerTask
from keras_rs_contrib.vocabulary import Vocabulary

# Arguments of the model that are layers or `None`.
OPTIONAL_LAYERS = ("retrieval", "sampling_probability", "mixed_negatives", "cross_batch_memory")


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class TwoTowerModel(ModelWithObjective):
    """A two-tower retrieval model on dicts of features.

    Batches are dicts of `[batch, ...]` arrays. They come from arrays, a `tf.data.Dataset` or a `keras.utils.PyDataset`,
    and may have any size on any number of devices: the model pads them with rows of weight 0, which do not affect
    losses, metrics or predictions. Every row whose `sample_weight` is 0 counts as absent: it is neither a positive nor
    a negative.

    Without `label`, each query's candidate is a positive, and the other candidates of the global batch are negatives.
    With `label`, the score of each pair is compared with its label. `evaluate` returns the loss and, if candidate ids
    are known, metrics over the whole corpus. `predict`, and a call with query features only, return the top k of the
    index.

    A plain `keras.layers.Embedding` candidate tower stays plain: it is neither replaced nor padded, and the index reads
    its variable. The index of any other tower holds the output of the tower. `evaluate`, `predict`, `recommend`,
    `evaluate_queries` and saving refresh it if the tower has changed. A direct call neither refreshes the index nor
    checks the values of the batch.

    Layers that mix the rows of a batch in training, such as batch normalization or activity regularization, also see
    padding rows, which repeat the last row of the batch. With such towers, choose batches that divide over the devices.

    Args:
        query_tower: a Keras layer or model that maps query features to `[batch, embedding_dim]` embeddings.
        candidate_tower: a Keras layer or model that maps candidate features to `[batch, embedding_dim]` embeddings.
        query_features: name of the feature of the query tower, which receives a tensor, or a list of names, of which
            it receives a dict.
        candidate_features: the same for the candidate tower. Both towers may use a feature.
        candidate_id: name of the feature that holds the candidate ids of the index. By default, the only feature of a
            candidate tower that is an embedding.
        query_id: name of the feature that tells queries apart, such as the user, for `seen` of `fit`. By default, the
            only feature of the query tower.
        vocabularies: dict of a `Vocabulary` for each feature that holds names. The towers receive rows: create their
            tables with `len(vocabulary)` rows. `fit`, `evaluate`, `predict`, `recommend`, `evaluate_queries` and
            `score` take names, and `recommend` returns those of candidates; `predict` and calls return rows. Ids of
            candidates in other features and arguments are names too. Queries that are not in the vocabulary get the
            most popular candidates from `recommend`.
        unknown_candidates: `"error"`, or `"skip"` to give rows whose candidate is not in its vocabulary the weight 0,
            and to warn how many there were.
        label: name of the feature that holds labels, to which scores are fitted. The labels may also be passed as `y`.
            `None` trains on positives.
        task: a `DistributedTwoTowerTask`. By default, with `label` or an index by dot product,
            `DistributedTwoTowerTask()`; otherwise, one with cosine similarity or that of the index, temperature 0.2
            and, if candidate ids are known, without accidental hits.
        retrieval: the result of `shard_candidates` for the candidate tower or, if the tower is an embedding, a plain
            `keras_rs.layers.BruteForceRetrieval`. By default, `BruteForceRetrieval(k=10)` if the tower is an embedding.
            With a vocabulary of candidates, an index of an embedding never returns row 0. Without an index, the model
            does not retrieve, and `evaluate` has no corpus metrics.
        sampling_probability: a `StreamingSamplingProbability`, which receives candidate ids, for the log-q correction
            of the in-batch softmax. `None` for no correction. By default, with the default task, one for all rows of
            the candidate tower or of the vocabulary.
        mixed_negatives: a `MixedNegatives`, which draws additional negatives in training and applies its own log-q
            correction. The id must be the only feature of the candidate tower.
        cross_batch_memory: a `CrossBatchMemory`, whose candidates are additional negatives in training.
        exclude_feature: name of the feature that holds excluded ids, `[batch, m]` ints, padded with -1. These
            candidates are excluded for their query in `evaluate`, `predict` and calls. Batches may omit the feature.
        positive_feature: name of the feature that holds further positives of each query, `[batch, m]` ids padded with
            -1, such as all that a user has watched. They are not negatives of the query. It may be `exclude_feature`.
            Batches may omit the feature.
        negative_feature: name of the feature that holds negatives of each query alone, `[batch, n]` ids padded with -1,
            such as impressions without a click. The id must be the only feature of the candidate tower. Batches may
            omit the feature.
        negative_probability_feature: name of the feature that holds the sampling probabilities of `negative_feature`,
            `[batch, n]` float, for their log-q correction. By default, they are not corrected.
        batch_metrics: metrics of one-hot labels and logits of the in-batch softmax, such as
            `keras.metrics.TopKCategoricalAccuracy(10)`, as `batch_metrics` of TFRS. They store the logits of a batch.
        corpus_metrics: rank metrics for `evaluate`, such as `RecallAtK(10)`. By default, recall and NDCG at the `k` of
            the index, and the mean reciprocal rank. An empty list for none.
        corpus_positives: which rows are positives in `corpus_metrics`: a number, the least label of a positive; or the
            name of a feature with the weight of each row as a positive, `[batch]`, 0 for none. By default, with
            `label`, rows whose label is positive, and without `label`, all rows.
        exclude_seen: whether lists leave out what a query has seen, if `fit` got `seen`, in validation, `evaluate`,
            `evaluate_queries` and `recommend`. `predict` and calls do not.
        check_inputs: whether to check each batch on the host before the model uses it, and the loss of each epoch. Ids
            outside their table, and values or losses that are not finite, are errors. Error messages count rows within
            the batch; `shuffle=False` keeps the order of the data.
        **kwargs: arguments of `keras.Model`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if arguments do not fit together. On data, if a check of `check_inputs` fails, a feature is missing,
            labels come without `label`, or the data are empty.
        NotImplementedError: if the backend is neither JAX nor TensorFlow, or for training, not JAX.

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

    _lookups: TowerLookups
    _skipped: Skipped

    @explains_keywords
    def __init__(
        self,
        query_tower: keras.layers.Layer,
        candidate_tower: keras.layers.Layer,
        query_features: str | Sequence[str],
        candidate_features: str | Sequence[str],
        *,
        candidate_id: str | None = None,
        query_id: str | None = None,
        vocabularies: dict[str, Vocabulary] | None = None,
        unknown_candidates: str = "error",
        label: str | None = None,
        task: DistributedTwoTowerTask | None = None,
        retrieval: keras_rs.layers.BruteForceRetrieval | None = None,
        sampling_probability: StreamingSamplingProbability | str | None = "auto",
        mixed_negatives: MixedNegatives | None = None,
        cross_batch_memory: CrossBatchMemory | None = None,
        exclude_feature: str | None = None,
        positive_feature: str | None = None,
        negative_feature: str | None = None,
        negative_probability_feature: str | None = None,
        batch_metrics: Iterable[keras.metrics.Metric] = (),
        corpus_metrics: Iterable[RankMetric] | None = None,
        corpus_positives: float | str | None = None,
        exclude_seen: bool = True,
        check_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() not in ("jax", "tensorflow"):
            raise NotImplementedError(
                "`TwoTowerModel` needs the JAX backend, or TensorFlow to answer requests. Received: "
                f"{keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        for name, tower in (("query_tower", query_tower), ("candidate_tower", candidate_tower)):
            check_type(name, tower, keras.layers.Layer)
        if task is not None:
            check_task(task)
        if sampling_probability != "auto":
            check_type("sampling_probability", sampling_probability, StreamingSamplingProbability, optional=True)
        check_type("mixed_negatives", mixed_negatives, MixedNegatives, optional=True)
        check_type("cross_batch_memory", cross_batch_memory, CrossBatchMemory, optional=True)
        check_type("retrieval", retrieval, keras_rs.layers.BruteForceRetrieval, optional=True)
        # Autocast would round labels, and ids that come as floats.
        super().__init__(**{"autocast": False, **kwargs})
        self.query_tower = query_tower
        self.candidate_tower = candidate_tower
        self.query_features = feature_names("query_features", query_features)
        self.candidate_features = feature_names("candidate_features", candidate_features)
        check_tower("query_tower", query_tower, self.query_features)
        check_tower("candidate_tower", candidate_tower, self.candidate_features)
        features = {
            "candidate_id": candidate_id,
            "query_id": query_id,
            "label": label,
            "exclude_feature": exclude_feature,
            "positive_feature": positive_feature,
            "negative_feature": negative_feature,
            "negative_probability_feature": negative_probability_feature,
        }
        for name, feature in features.items():
            check_type(name, feature, str, optional=True)
        towers = ((query_tower, self.query_features), (candidate_tower, self.candidate_features))
        self.candidate_id = feature_of_ids(candidate_id, self.candidate_features, candidate_tower, retrieval)
        self.query_id = self.query_features if query_id is None and isinstance(self.query_features, str) else query_id
        self.vocabularies = check_vocabularies(vocabularies, towers, (self.query_id, self.candidate_id))
        self.unknown_candidates = check_action(unknown_candidates)
        of_candidates = None if self.candidate_id is None else self.vocabularies.get(self.candidate_id)
        self.task = default_task(label, retrieval, self.candidate_id) if task is None else task
        self.retrieval = index_of_tower(retrieval, candidate_tower, self.task.similarity, of_candidates)
        if self.retrieval is not None and not self.retrieval.is_tied and self.candidate_id is not None:
            self.retrieval.take_ids_from(self.candidate_id)
        if self.retrieval is not None:
            self.retrieval.take_features(self.candidate_features)
            self.retrieval.take_vocabularies(self.vocabularies)
            if of_candidates is not None and not _keras.is_loading():
                fit_to_vocabulary(self.retrieval, of_candidates)
        self.label = label
        if isinstance(sampling_probability, str):
            has_default = task is None and label is None and mixed_negatives is None
            sampling_probability = default_sampling(self, of_candidates) if has_default else None
        self.sampling_probability = sampling_probability
        self.mixed_negatives = mixed_negatives
        self.cross_batch_memory = cross_batch_memory
        self.exclude_feature = exclude_feature
        self.positive_feature = positive_feature
        self.negative_feature = negative_feature
        self.negative_probability_feature = negative_probability_feature
        check_needs(self)
        check_drawn_ids(mixed_negatives, candidate_tower, self.candidate_features, self.candidate_id)
        self.batch_metrics = metrics_of_batch(batch_metrics, label)
        self.corpus_positives = check_corpus_positives(corpus_positives, label)
        self.corpus_metrics = metrics_of_corpus(corpus_metrics, 10 if self.retrieval is None else self.retrieval.k)
        self.exclude_seen = exclude_seen
        self.check_inputs = check_inputs
        hidden = {
            "_lookups": TowerLookups(towers, functools.partial(self.__call__, training=False)),
            "_seen_features": {},
            "_training_data": TrainingData(),
            "_skipped": Skipped(),
            "_access": Access(),
            checksums.ATTRIBUTE: checksums.Checksums(),
        }
        for name, value in hidden.items():
            # From Keras's attribute tracking.
            object.__setattr__(self, name, value)

    @property
    def model_inputs(self) -> ModelInputs:
        """How batches are checked, by the layers that the model has now."""
        return ModelInputs.of_model(self)

    # Compilation.

    def compile(
        self,
        optimizer: Any = "rmsprop",
        *,
        metrics: Sequence[Any] | None = None,
        weighted_metrics: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Configures training: see `keras.Model.compile`.

        Args:
            optimizer: as in `keras.Model.compile`.
            metrics: metrics of labels and scores, for a model with `label`. All of them receive the sample weights, so
                that padding rows do not count.
            weighted_metrics: more metrics of labels and scores, treated like `metrics`.
            **kwargs: other arguments of `keras.Model.compile`, except `loss`, which the task defines.

        Raises:
            ValueError: if a loss or a rank metric is given, or a metric of labels for a model without `label`.
        """
        if kwargs.get("loss") is not None or kwargs.get("loss_weights") is not None:
            raise ValueError(
                "The task defines the loss. Received: a loss in `compile`. "
                "Pass `task=DistributedTwoTowerTask(loss=...)` to the model."
            )
        all_metrics = [*(metrics or []), *(weighted_metrics or [])]
        if any(isinstance(metric, RankMetric) for metric in all_metrics):
            raise ValueError(
                "The metrics of `compile` compare labels with scores. Received: a rank metric. "
                "Pass it to the model as `corpus_metrics`."
            )
        if all_metrics and self.label is None:
            raise ValueError(
                "The metrics of `compile` compare labels with scores. Received: metrics for a model without `label`. "
                "Set `label` to the name of the feature that holds labels, or pass rank metrics as `corpus_metrics`."
            )
        check_optimizer_of_tables(optimizer, self)
        super().compile(optimizer, weighted_metrics=all_metrics or None, **kwargs)
        # Again: under "mixed_float16", Keras wraps the optimizer.
        check_optimizer_of_tables(self.optimizer, self)
        self._has_label_metrics = bool(all_metrics)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was compiled before saving."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        if self.built:
            self.optimizer.build(self.trainable_variables)

    # One step. Subclasses can override these methods, as in any `keras.Model`.

    def call(self, features: dict[str, Any], training: bool | None = None) -> Any:
        """Embeds queries and candidates, or retrieves candidates for queries.

        Args:
            features: dict of `[batch, ...]` arrays.
            training: whether the towers run in training mode.

        Returns:
            With query features only, the result of the index. With candidate features too, a dict with the keys
            `query_embeddings` and `candidate_embeddings`, `[batch, embedding_dim]` float. Outside of training, if the
            model has candidate ids, an index and `corpus_metrics`, the dict also holds `ranks`, `[batch]` int32: the
            ranks of the candidates in the whole corpus. In training with `mixed_negatives`, it also holds `drawn_ids`,
            `[num_negatives]` int32, whose embeddings follow those of the batch in `candidate_embeddings`. With
            `negative_feature`, it also holds `negative_embeddings`, `[batch, n, embedding_dim]`.

        Raises:
            TypeError: if `features` is not a dict.
            ValueError: if features are missing, or the model has no index to retrieve from.
        """
        names = self.model_inputs.names
        names.check(features, names.of_query)
        exclude_ids = names.exclude_ids(features)
        if self._is_retrieving or not names.are_candidates_in(features):
            query_embeddings = self._embed_queries(features, training)
            self._check_lookups(0, features)
            return self._index()(query_embeddings, exclude_ids=exclude_ids)
        result = {}
        if training and self.mixed_negatives is not None:
            result["drawn_ids"] = self.mixed_negatives.draw()
        candidates = TowerCandidates.join(features, names, result.get("drawn_ids"))
        query_embeddings, candidate_embeddings = self._embed(features, candidates.inputs, training)
        candidate_embeddings, negative_embeddings = candidates.split(candidate_embeddings)
        if negative_embeddings is not None:
            result["negative_embeddings"] = negative_embeddings
        self._check_lookups(0, features)
        self._check_lookups(1, features)
        result = {"query_embeddings": query_embeddings, "candidate_embeddings": candidate_embeddings, **result}
        if self.cross_batch_memory is not None and not self.cross_batch_memory.built:
            self.cross_batch_memory.build(candidate_embeddings.shape)
        if self.retrieval is not None and not self.retrieval.built:
            # Keras expects the first batch to build all layers, even if nothing below calls the index.
            self.retrieval.build(query_embeddings.shape)
        if training or not self.ranks_in_evaluation:
            return result
        assert self.retrieval is not None
        assert self.candidate_id is not None
        names.check(features, [self.candidate_id])
        candidate_ids = flat(features[self.candidate_id])
        result["ranks"] = self.retrieval.ranks(query_embeddings, candidate_ids, exclude_ids=exclude_ids)
        if POPULAR_RANKS in features:
            popular = features[POPULAR_RANKS]
            result["ranks"] = ops.where(ops.greater_equal(popular, 0), popular, result["ranks"])
        return result

    def _embed(self, features: dict[str, Any], candidates: Any, training: bool | None) -> Any:
        """Returns the embeddings of queries and candidates."""

        def embed() -> tuple[Any, Any]:
            query_embeddings = self._embed_queries(features, training)
            return query_embeddings, embeddings_of(self.candidate_tower, candidates, training, "candidate_tower")

        return embed_with_joined_lookups(self, embed) if training else embed()

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized."""
        config: dict[str, Any] = super().get_config()
        serialize = keras.saving.serialize_keras_object
        with _keras.sharing_objects():
            shared = shared_layers(self.query_tower, self.candidate_tower)
            if shared:
                config["shared_layers"] = shared
            config.update(
                query_tower=serialize(self.query_tower),
                candidate_tower=serialize(self.candidate_tower),
                task=serialize(self.task),
                query_features=self.query_features,
                candidate_features=self.candidate_features,
                candidate_id=self.candidate_id,
                query_id=self.query_id,
                vocabularies=config_of_vocabularies(self.vocabularies),
                unknown_candidates=self.unknown_candidates,
                label=self.label,
                exclude_feature=self.exclude_feature,
                positive_feature=self.positive_feature,
                negative_feature=self.negative_feature,
                negative_probability_feature=self.negative_probability_feature,
                batch_metrics=[serialize(metric) for metric in self.batch_metrics],
                corpus_metrics=[serialize(metric) for metric in self.corpus_metrics],
                corpus_positives=self.corpus_positives,
                exclude_seen=self.exclude_seen,
                check_inputs=self.check_inputs,
            )
            for name in OPTIONAL_LAYERS:
                layer = getattr(self, name)
                config[name] = None if layer is None else serialize(layer)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TwoTowerModel:
        """Returns the model that `get_config` describes."""
        # Deserializing a layer may change its config.
        config = copy_of_config(config)
        if "corpus_positives" not in config:
            # In files of version 0.1, a list of one feature is the feature itself.
            for name in ("query_features", "candidate_features"):
                config[name] = config[name][0] if len(config[name]) == 1 else config[name]
        deserialize = keras.saving.deserialize_keras_object
        config["vocabularies"] = vocabularies_of_config(config.get("vocabularies"))
        with _keras.sharing_objects():
            for layer in config.pop("shared_layers", ()):
                deserialize_tower(layer)
            for name in ("query_tower", "candidate_tower", "task", *OPTIONAL_LAYERS):
                if isinstance(config.get(name), dict):
                    config[name] = deserialize_tower(config[name])
            for name in ("batch_metrics", "corpus_metrics"):
                if config.get(name) is not None:
                    config[name] = [deserialize(each) if isinstance(each, dict) else each for each in config[name]]
        return cls(**config)

    def _check_lookups(self, tower: int, features: dict[str, Any]) -> None:
        """Raises `ValueError` if a tower rounds ids, which shows without their values."""
        # While Keras traces for shapes, it would turn the error into a warning.
        if self.check_inputs and not _keras.is_tracing_symbolically():
            self._lookups.trace(tower, features)
