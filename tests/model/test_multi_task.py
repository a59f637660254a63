"""Two tasks on shared towers, in a model of your own: the model below is the pattern, the tests show that it holds."""

import keras
import keras_rs
import numpy as np
import pytest
import reference
from conftest import data_parallel
from keras import ops

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    NDCGAtK,
    RecallAtK,
    RowAdagrad,
    RowSparseEmbedding,
    pad_batches,
    shard_candidates,
)


@keras.saving.register_keras_serializable(package="tests")
class RatingsAndRetrieval(keras.Model):
    """Predicts ratings and retrieves movies, with one embedding for each user and movie.

    `call` runs each tower once and returns what both tasks need. `compute_loss` adds the losses up. Both tasks train
    the same tables, and the index searches the table of the movies.

    Data come from `pad_batches`, whose padding rows weigh 0:

    - The in-batch softmax gets `candidate_mask=sample_weight != 0`, so that padding rows are not negatives.
    - The loss of the ratings has the reduction "mean_with_sample_weight", and metrics get the weights. Ratings have
      the shape `[batch, 1]`: Keras takes the mean over the last axis first, and the weights apply to what is left.

    `build` creates all weights, so that a file loads without a call: Keras would call the loaded model with ids of
    type float.

    Args:
        num_users: number of users.
        num_movies: number of movies.
        rating_weight: weight of the loss of the ratings. The loss of retrieval weighs 1.
        is_row_sparse: whether the tables train only the rows in the batch. Each is looked up once in a step.
    """

    def __init__(self, num_users, num_movies, rating_weight=0.5, is_row_sparse=False, **kwargs):
        super().__init__(**kwargs)
        self.num_users, self.num_movies = num_users, num_movies
        self.rating_weight, self.is_row_sparse = rating_weight, is_row_sparse
        arguments = {"optimizer": RowAdagrad(0.1)} if is_row_sparse else {}
        table = RowSparseEmbedding if is_row_sparse else keras.layers.Embedding
        self.user_tower = table(num_users, 8, name="user", **arguments)
        self.movie_tower = table(num_movies, 8, name="movie", **arguments)
        self.index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=5), self.movie_tower)
        self.retrieval = DistributedTwoTowerTask(remove_accidental_hits=True)
        self.rating_head = keras.Sequential([keras.layers.Dense(16, activation="relu"), keras.layers.Dense(1)])
        self.rating_loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
        self.rating_error = keras.metrics.RootMeanSquaredError(name="rmse")
        self.corpus_metrics = [RecallAtK(5), NDCGAtK(5)]

    def build(self, input_shape):
        self.user_tower.build((None,))
        self.movie_tower.build((None,))
        self.index.build((None, 8))
        self.rating_head.build((None, 16))

    def call(self, features, training=False):
        users = self.user_tower(features["user_id"])
        if "movie_id" not in features:
            return self.index(users)
        movies = self.movie_tower(features["movie_id"])
        result = {"users": users, "movies": movies}
        result["ratings"] = self.rating_head(ops.concatenate([users, movies], axis=1))
        if not training:
            result["ranks"] = self.index.ranks(users, features["movie_id"])
        return result

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        is_present = None if sample_weight is None else sample_weight != 0
        retrieval_loss = self.retrieval(
            y_pred["users"],
            y_pred["movies"],
            candidate_ids=x["movie_id"],
            candidate_mask=is_present,
            sample_weight=sample_weight,
        )
        return retrieval_loss + self.rating_weight * self.rating_loss(y[:, None], y_pred["ratings"], sample_weight)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.rating_error.update_state(y[:, None], y_pred["ratings"], sample_weight)
        if "ranks" in y_pred:
            for metric in self.corpus_metrics:
                metric.update_state(y_pred["ranks"], sample_weight=sample_weight)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def recommend(self, users, k=5, **limits):
        """Returns the `k` best movies of each user; `exclude_ids` and `include_ids` limit the choice."""
        return self.index.find(self.user_tower(users), k, **limits)[1]

    def get_config(self):
        arguments = ("num_users", "num_movies", "rating_weight", "is_row_sparse")
        return {**super().get_config(), **{name: getattr(self, name) for name in arguments}}


NUM_USERS, NUM_MOVIES, NUM_RATINGS, BATCH_SIZE = 12, 20, 61, 8
KINDS = {"plain tables": False, "row-sparse tables": True}


def make_data():
    rng = np.random.default_rng(0)
    features = {
        "user_id": rng.integers(0, NUM_USERS, NUM_RATINGS).astype("int32"),
        "movie_id": rng.integers(0, NUM_MOVIES, NUM_RATINGS).astype("int32"),
    }
    return features, (features["movie_id"] % 5).astype("float32")


def trained(is_row_sparse, num_devices=None, epochs=3):
    keras.distribution.set_distribution(None if num_devices is None else data_parallel(num_devices))
    keras.utils.set_random_seed(0)
    model = RatingsAndRetrieval(NUM_USERS, NUM_MOVIES, is_row_sparse=is_row_sparse)
    model.compile(keras.optimizers.Adam(0.02))
    # The last of eight batches has five rows, which do not divide over two devices.
    model.fit(pad_batches(make_data(), batch_size=BATCH_SIZE), epochs=epochs, verbose=0)
    return model


def evaluated(model):
    logs = model.evaluate(pad_batches(make_data(), batch_size=BATCH_SIZE), verbose=0, return_dict=True)
    # Keras weighs the loss of a batch by its padded length.
    return {name: float(value) for name, value in logs.items() if name != "loss"}


def tables(model):
    weights = [model.user_tower.embeddings.numpy()[:NUM_USERS], model.movie_tower.embeddings.numpy()[:NUM_MOVIES]]
    return weights + [weight.numpy() for weight in model.rating_head.weights]


@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_train_like_one(kind):
    one = trained(KINDS[kind])
    expected, expected_logs = tables(one), evaluated(one)
    two = trained(KINDS[kind], num_devices=2)
    for value, other in zip(tables(two), expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-5)
    assert evaluated(two) == pytest.approx(expected_logs, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_sum_of_both_tasks(kind):
    model = trained(KINDS[kind], epochs=0)
    x, ratings, sample_weight = next(
        iter(
            pad_batches(
                ({"user_id": np.array([3, 3, 1]), "movie_id": np.array([7, 2, 7])}, np.array([1.0, 4.0, 2.0])), 4
            )
        )
    )
    y_pred = model(x)
    loss = model.compute_loss(x, ratings, y_pred, keras.ops.convert_to_tensor(sample_weight))
    users, movies = tables(model)[:2]
    softmax = reference.softmax_loss(
        users[[3, 3, 1]], movies[[7, 2, 7]], candidate_ids=[7, 2, 7], remove_accidental_hits=True
    )
    squares = [(float(y) - float(p)) ** 2 for y, p in zip([1.0, 4.0, 2.0], y_pred["ratings"][:3, 0], strict=True)]
    assert float(loss) == pytest.approx(softmax + 0.5 * np.mean(squares), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_both_tasks_learn_and_are_evaluated(kind):
    model = trained(KINDS[kind], epochs=0)
    before = evaluated(model)
    model.fit(pad_batches(make_data(), batch_size=BATCH_SIZE), epochs=60, verbose=0)
    after = evaluated(model)
    assert after["rmse"] < 0.6 * before["rmse"]
    assert after["recall_at_5"] > 1.3 * before["recall_at_5"]
    users, movies = tables(model)[:2]
    features, ratings = make_data()
    ranks = reference.ranks(users[features["user_id"]], movies, features["movie_id"].tolist())
    assert after["recall_at_5"] == pytest.approx(
        reference.mean_over_queries(lambda row: reference.recall(row, 5), ranks)
    )
    assert after["ndcg_at_5"] == pytest.approx(reference.mean_over_queries(lambda row: reference.ndcg(row, 5), ranks))
    predicted = np.asarray(model(features)["ratings"])[:, 0]
    assert after["rmse"] == pytest.approx(np.sqrt(np.mean((predicted - ratings) ** 2)), rel=1e-5)


@pytest.mark.parametrize(("kind", "num_devices"), list(zip(KINDS, (None, 2), strict=True)))
def test_a_loaded_model_evaluates_recommends_and_trains_on(tmp_path, kind, num_devices):
    model = trained(KINDS[kind], num_devices)
    expected, seen = evaluated(model), [[4, 7]] * NUM_USERS
    all_users = np.arange(NUM_USERS, dtype="int32")
    scores, ids = model.predict({"user_id": all_users}, verbose=0)
    users, movies = tables(model)[:2]
    np.testing.assert_array_equal(ids, reference.top_k(users, movies, 5)[1])
    np.testing.assert_array_equal(
        model.recommend(all_users, exclude_ids=seen), reference.top_k(users, movies, 5, exclude_ids=[4, 7])[1]
    )
    model.save(tmp_path / "model.keras")
    for load_on in (None, 2):
        keras.distribution.set_distribution(None if load_on is None else data_parallel(load_on))
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.index.candidate_tower is loaded.movie_tower
        assert evaluated(loaded) == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(loaded.predict({"user_id": all_users}, verbose=0)[0], scores, rtol=1e-5)
        before = tables(loaded)
        loaded.fit(pad_batches(make_data(), batch_size=BATCH_SIZE), verbose=0)
        assert all(not np.array_equal(value, other) for value, other in zip(tables(loaded), before, strict=True))
        # The index is the trained table.
        np.testing.assert_array_equal(
            loaded.recommend(all_users, include_ids=[3, 5, 8]),
            reference.top_k(*tables(loaded)[:2], 5, exclude_ids=set(range(20)) - {3, 5, 8})[1],
        )
