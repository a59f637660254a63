"""`TwoTowerModel` with negatives drawn from the corpus, and with candidates of earlier batches."""

import jax
import keras
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import (
    CrossBatchMemory,
    DistributedTwoTowerTask,
    MixedNegatives,
    RowAdagrad,
    RowSparseEmbedding,
    StreamingSamplingProbability,
    TwoTowerModel,
    mixed_sampling_probability,
)

NUM_USERS, NUM_MOVIES, DIMENSION, NUM_DRAWN, CAPACITY, BATCH = 20, 15, 4, 6, 10, 7
DATA = {"user_id": np.arange(3 * BATCH) % NUM_USERS, "movie_id": np.random.default_rng(0).zipf(1.5, 3 * BATCH) % 15}
COUNTS = np.arange(1, NUM_MOVIES + 1)


@keras.saving.register_keras_serializable(package="tests")
class WatchedTask(DistributedTwoTowerTask):
    """Records the candidates that it is called with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        object.__setattr__(self, "told", [])

    def call(self, query_embeddings, candidate_embeddings, **kwargs):
        told = {name: value for name, value in kwargs.items() if value is not None}
        jax.debug.callback(self.told.append, {"candidate_embeddings": candidate_embeddings, **told}, ordered=True)
        return super().call(query_embeddings, candidate_embeddings, **kwargs)


def negatives():
    return {
        "mixed_negatives": MixedNegatives(StreamingSamplingProbability(NUM_MOVIES, counts=COUNTS), NUM_DRAWN, seed=5),
        "cross_batch_memory": CrossBatchMemory(CAPACITY),
    }


def make_model(task=None, **kwargs):
    keras.utils.set_random_seed(0)
    towers = [RowSparseEmbedding(rows, DIMENSION, RowAdagrad(0.5)) for rows in (NUM_USERS, NUM_MOVIES)]
    task = task or DistributedTwoTowerTask(temperature=0.2, remove_accidental_hits=True)
    model = TwoTowerModel(*towers, "user_id", "movie_id", task=task, **(kwargs or negatives()))
    model.compile("sgd")
    return model


def fit(model, epochs=1):
    return model.fit(DATA, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def values(told, name):
    return np.asarray(told[name], "float32")


def test_drawn_and_earlier_candidates_are_negatives_only_in_training():
    model = make_model(WatchedTask(remove_accidental_hits=True))
    model({"user_id": DATA["user_id"], "movie_id": DATA["movie_id"]})
    table = model.candidate_tower.embeddings.numpy()
    model.task.told.clear()
    fit(model)
    jax.effects_barrier()
    first, second, _ = model.task.told
    for told in (first, second):
        assert {name: len(value) for name, value in told.items() if name.startswith("candidate")} == dict.fromkeys(
            ("candidate_embeddings", "candidate_ids", "candidate_sampling_probability", "candidate_mask"),
            BATCH + NUM_DRAWN + CAPACITY,
        )
    ids = np.asarray(first["candidate_ids"])
    np.testing.assert_array_equal(ids[:BATCH], DATA["movie_id"][:BATCH])
    fresh = slice(BATCH + NUM_DRAWN)
    np.testing.assert_array_equal(values(first, "candidate_embeddings")[fresh], table[ids[fresh]])
    share = model.mixed_negatives.sampling_probability(np.arange(NUM_MOVIES), training=False)
    assert np.asarray(first["candidate_mask"])[fresh].all()
    assert not np.asarray(first["candidate_mask"])[fresh.stop :].any()
    # The initial counts outweigh the few batches of this test.
    np.testing.assert_allclose(
        values(first, "candidate_sampling_probability")[fresh],
        mixed_sampling_probability(np.asarray(share), 1 / NUM_MOVIES, BATCH, NUM_DRAWN)[ids[fresh]],
        rtol=0.2,
    )
    # In the second step, the memory holds the most recent candidates of the first, with their embeddings at that time.
    kept = slice(fresh.stop - CAPACITY, fresh.stop)
    in_memory = slice(fresh.stop, None)
    assert np.asarray(second["candidate_mask"])[in_memory].all()
    order = np.argsort(np.asarray(second["candidate_ids"])[in_memory], kind="stable")
    expected = np.argsort(ids[kept], kind="stable")
    for name in ("candidate_ids", "candidate_embeddings", "candidate_sampling_probability"):
        kept_values = values(first, name)[kept][expected]
        np.testing.assert_allclose(np.sort(values(second, name)[in_memory][order], 0), np.sort(kept_values, 0))

    model.evaluate(DATA, batch_size=BATCH, verbose=0)
    jax.effects_barrier()
    told = model.task.told[-1]
    assert {len(value) for name, value in told.items() if name.startswith("candidate")} == {BATCH}


def test_8_devices_train_like_one():
    expected = make_model()
    expected_losses = fit(expected, epochs=3)
    keras.distribution.set_distribution(data_parallel(8))
    model = make_model()
    # 7 rows for 8 devices: one row is padding. It is not counted, and the memory does not keep it.
    np.testing.assert_allclose(fit(model, epochs=3), expected_losses, rtol=1e-5)
    for weight, expected_weight in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected_weight, rtol=1e-4, atol=1e-6)


def test_a_loaded_model_continues_training_as_if_never_saved(tmp_path):
    model = make_model()
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(fit(loaded), fit(model), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "rating"}, "together with `mixed_negatives`, `cross_batch_memory`"),
        (
            {"sampling_probability": StreamingSamplingProbability(NUM_MOVIES)},
            "Received: `mixed_negatives` and `sampling_probability`. Drop `sampling_probability`",
        ),
        (
            {
                "candidate_tower": keras.layers.Dense(DIMENSION),
                "candidate_features": ["movie_id", "tokens"],
                "candidate_id": "movie_id",
            },
            r"only feature of the candidate tower. Received: candidate_features=\['movie_id', 'tokens'\]",
        ),
        (
            {"mixed_negatives": MixedNegatives(StreamingSamplingProbability(NUM_MOVIES + 1), 2)},
            "16 candidates to draw from, for 15 rows",
        ),
    ],
)
def test_invalid_combinations_with_additional_negatives_raise(arguments, message):
    towers = {
        "query_tower": keras.layers.Embedding(NUM_USERS, DIMENSION),
        "candidate_tower": keras.layers.Embedding(NUM_MOVIES, DIMENSION),
    }
    names = {"query_features": "user_id", "candidate_features": "movie_id"}
    with pytest.raises(ValueError, match=message):
        TwoTowerModel(**{**towers, **names, **negatives(), **arguments})


def test_additional_negatives_need_candidate_ids():
    towers = keras.layers.Embedding(3, 4), keras.Sequential([keras.layers.Embedding(20, 4)])
    with pytest.raises(ValueError, match=r"`cross_batch_memory` needs candidate ids. Received: candidate_id=None"):
        TwoTowerModel(*towers, "user_id", "movie_id", cross_batch_memory=CrossBatchMemory(4))
