import keras
import keras_rs
import numpy as np
import pytest

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    EvaluateQueries,
    RecallAtK,
    RefreshCandidates,
    TwoTowerModel,
    shard_candidates,
)

DIMENSION = 4


class Model(keras.Model):
    """A query tower and a candidate tower of features. `staleness` measures how stale the index is."""

    def __init__(self):
        super().__init__()
        self.query_tower = keras.layers.Dense(DIMENSION)
        self.candidate_tower = keras.Sequential([keras.layers.Dense(DIMENSION)])
        self.features = np.eye(6, dtype="float32")
        retrieval = keras_rs.layers.BruteForceRetrieval(k=2, return_scores=True)
        self.retrieval = shard_candidates(retrieval, self.candidate_tower, candidates=self.features)

    def call(self, x, training=False):
        queries = self.query_tower(x)
        if not training:
            self.retrieval(queries)
        return queries

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y_pred - self.candidate_tower(y)))

    def staleness(self):
        embeddings = self.candidate_tower(self.features)
        return float(np.abs(np.asarray(embeddings) - self.retrieval.candidate_embeddings.numpy()).max())


class Staleness(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_test_end(self, logs=None):
        self.seen.append(self.model.staleness())

    def on_train_end(self, logs=None):
        self.seen.append(self.model.staleness())


def fit(callbacks, validate=True):
    model = Model()
    model.compile(keras.optimizers.SGD(0.5))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)).astype("float32"), np.eye(6, dtype="float32")[rng.integers(0, 6, 12)]
    staleness = Staleness()
    validation_data = (x, y) if validate else None
    model.fit(x, y, validation_data=validation_data, epochs=2, verbose=0, callbacks=[*callbacks(model), staleness])
    return staleness.seen


def test_the_index_of_a_feature_tower_becomes_stale_in_training():
    assert min(fit(lambda model: [])) > 0.01


@pytest.mark.parametrize("validate", [False, True])
def test_the_index_is_fresh_in_validation_and_after_training(validate):
    seen = fit(lambda model: [RefreshCandidates(model.retrieval)], validate)
    assert len(seen) == (3 if validate else 1)
    assert max(seen) == 0


def test_refresh_candidates_requires_an_index():
    with pytest.raises(TypeError, match="`index` must be a `ShardedBruteForceRetrieval`"):
        RefreshCandidates(keras.layers.Dense(3))


def test_refresh_candidates_skips_the_index_of_an_embedding():
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), keras.layers.Embedding(5, 4))
    RefreshCandidates(index).on_test_begin()
    with pytest.raises(ValueError, match="takes no `candidates`"):
        index.refresh(np.arange(5))


@pytest.mark.parametrize("epochs", [None, [2]])
def test_query_metrics_are_added_to_the_history(epochs):
    towers = keras.layers.Embedding(6, 4), keras.layers.Embedding(8, 4)
    model = TwoTowerModel(*towers, "user_id", "movie_id", task=DistributedTwoTowerTask())
    model.compile(keras.optimizers.Adam(0.1))
    users, positives = {"user_id": np.arange(6)}, np.array([[1, 2], [3, -1], [-1, -1], [0, 7], [5, 4], [6, 2]])
    seen = []

    class Noting(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(model.evaluate_queries(users, positives, metrics=[RecallAtK(2)])["recall_at_2"])
            if "val_query_recall_at_2" in logs:
                assert logs["val_query_recall_at_2"] == seen[-1]

    evaluate = EvaluateQueries(users, positives, metrics=[RecallAtK(2)], epochs=epochs)
    data = {"user_id": np.arange(6).repeat(4), "movie_id": np.arange(24) % 8}
    history = model.fit(data, epochs=3, verbose=0, callbacks=[evaluate, Noting()]).history
    assert history["val_query_recall_at_2"] == (seen if epochs is None else [seen[1]])
    assert len(set(seen)) > 1
