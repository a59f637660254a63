"""A query's other positives, its own negatives, and metrics within the batch, in a `TwoTowerModel`."""

import keras
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import (
    CrossBatchMemory,
    DistributedTwoTowerTask,
    MixedNegatives,
    RowSGD,
    RowSparseEmbedding,
    StreamingSamplingProbability,
    TwoTowerModel,
)

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
USERS, MOVIES = np.arange(24) % 20, RNG.integers(0, 12, 24)
WATCHED = np.where(RNG.random((24, 4)) < 0.7, RNG.integers(0, 12, (24, 4)), -1)
SHOWN = np.where(RNG.random((24, 3)) < 0.7, RNG.integers(0, 12, (24, 3)), -1)
DATA = {"user": USERS, "movie": MOVIES, "watched": WATCHED, "shown": SHOWN}


def make_model(table=keras.layers.Embedding, **kwargs):
    arguments = {"embeddings_initializer": keras.initializers.RandomNormal(seed=1)}
    arguments |= {"optimizer": RowSGD(0.5)} if table is RowSparseEmbedding else {}
    towers = table(20, 8, **arguments), table(12, 8, **arguments)
    model = TwoTowerModel(*towers, "user", "movie", **{"task": DistributedTwoTowerTask(), **kwargs})
    model.compile(keras.optimizers.SGD(0.5))
    return model


def loss_of(model, positives, negatives):
    """The loss of all data as one batch, row by row."""
    users, movies = (tower.embeddings.numpy() for tower in (model.query_tower, model.candidate_tower))
    losses = []
    for row, user in enumerate(USERS):
        columns = [row, *(other for other in range(24) if other != row and MOVIES[other] not in positives[row])]
        ids = [*MOVIES[columns], *(shown for shown in negatives[row] if shown >= 0 and shown not in positives[row])]
        logits = movies[ids] @ users[user]
        losses.append(np.log(np.exp(logits).sum()) - logits[0])
    return np.mean(losses)


NONE = np.full((24, 0), -1)


def test_other_positives_and_own_negatives_enter_the_loss():
    keras.distribution.set_distribution(data_parallel(2))
    cases = {
        (None, None): loss_of,
        ("watched", None): lambda model, *_: loss_of(model, WATCHED, NONE),
        (None, "shown"): lambda model, *_: loss_of(model, NONE, SHOWN),
        ("watched", "shown"): lambda model, *_: loss_of(model, WATCHED, SHOWN),
    }
    for (positive_feature, negative_feature), expected in cases.items():
        model = make_model(positive_feature=positive_feature, negative_feature=negative_feature)
        loss = model.evaluate(DATA, batch_size=24, verbose=0, return_dict=True)["loss"]
        assert loss == pytest.approx(expected(model, NONE, NONE), abs=1e-5)
        history = model.fit(DATA, batch_size=24, epochs=2, verbose=0).history["loss"]
        assert history[0] == pytest.approx(loss, abs=1e-5)
        assert history[1] < history[0]
    with_other = {name: values for name, values in DATA.items() if name not in ("watched", "shown")}
    loss = model.evaluate(with_other, batch_size=24, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(loss_of(model, NONE, NONE), abs=1e-5)


@pytest.mark.parametrize("option", ["mixed", "memory", "sampling"])
def test_all_kinds_of_negatives_work_together(option, tmp_path):
    options = {
        "mixed": {"mixed_negatives": MixedNegatives(StreamingSamplingProbability(12), num_negatives=5, seed=0)},
        "memory": {"cross_batch_memory": CrossBatchMemory(16)},
        "sampling": {"sampling_probability": StreamingSamplingProbability(12)},
    }[option]
    task = DistributedTwoTowerTask(remove_accidental_hits=True)
    results = []
    for table in (keras.layers.Embedding, RowSparseEmbedding):
        keras.utils.set_random_seed(0)
        model = make_model(
            table, task=task, positive_feature="watched", exclude_feature="watched", negative_feature="shown",
            **{name: type(layer).from_config(layer.get_config()) for name, layer in options.items()},
        )  # fmt: skip
        results.append(model.fit(DATA, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*results, atol=1e-5)
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    assert (loaded.positive_feature, loaded.negative_feature) == ("watched", "shown")
    losses = [each.evaluate(DATA, verbose=0, return_dict=True)["loss"] for each in (model, loaded)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_probabilities_of_own_negatives_correct_their_logits():
    uncorrected = make_model(negative_feature="shown")
    corrected = make_model(negative_feature="shown", negative_probability_feature="probability")
    data = {**DATA, "probability": np.full((24, 3), 0.25, "float32")}
    losses = [
        model.evaluate(data, batch_size=24, verbose=0, return_dict=True)["loss"] for model in (uncorrected, corrected)
    ]
    # A probability of 1/4 counts each of them four times.
    repeated = loss_of(uncorrected, NONE, np.tile(SHOWN, 4))
    assert losses[1] == pytest.approx(repeated, abs=1e-5)
    assert losses[0] < losses[1]


def test_batch_metrics_are_those_of_the_logits(tmp_path):
    keras.distribution.set_distribution(data_parallel(2))
    metric = keras.metrics.TopKCategoricalAccuracy(k=3, name="in_batch_top_3")
    model = make_model(batch_metrics=[metric])
    # 23 rows are padded on two devices.
    data = {name: values[:23] for name, values in DATA.items()}
    result = model.evaluate(data, batch_size=23, verbose=0, return_dict=True)["in_batch_top_3"]
    users, movies = (tower.embeddings.numpy() for tower in (model.query_tower, model.candidate_tower))
    logits = users[USERS[:23]] @ movies[MOVIES[:23]].T
    better = (logits > np.diag(logits)[:, None]).sum(axis=1)
    # Candidates that occur twice tie.
    assert np.mean(better < 1) - 1e-6 <= result <= np.mean(better < 3) + 1e-6
    history = model.fit(data, batch_size=23, epochs=30, validation_data=data, verbose=0).history
    assert history["in_batch_top_3"][-1] > history["in_batch_top_3"][0]
    assert "val_in_batch_top_3" in history
    model.save(tmp_path / "a.keras")
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    results = [each.evaluate(data, verbose=0, return_dict=True)["in_batch_top_3"] for each in (model, loaded)]
    assert results[0] == results[1]


def test_invalid_options_raise():
    with pytest.raises(ValueError, match=r"With `label`.*`positive_feature`"):
        make_model(label="rating", positive_feature="watched")
    with pytest.raises(ValueError, match=r"With `label`.*`negative_feature`"):
        make_model(label="rating", negative_feature="shown")
    with pytest.raises(ValueError, match="negative_feature=None"):
        make_model(negative_probability_feature="probability")
    with pytest.raises(TypeError, match=r"`batch_metrics` must be a `Metric`"):
        make_model(batch_metrics=["accuracy"])
    with pytest.raises(ValueError, match=r"metrics of the in-batch softmax. Received: `label`"):
        make_model(label="rating", batch_metrics=[keras.metrics.TopKCategoricalAccuracy(3)])


def test_invalid_ids_of_positives_and_negatives_raise():
    model = make_model(positive_feature="watched", negative_feature="shown")
    for name, values, message in (
        ("shown", np.where(SHOWN == -1, 12, SHOWN), r"'shown' must be a whole number in \[0, 11\].*Received: 12"),
        ("shown", SHOWN - 1, r"'shown' must be a whole number in \[0, 11\].*Received: -2"),
        ("watched", WATCHED + 2**32, "'watched' must be in .*range of int32"),
        ("watched", WATCHED[:, 0], "'watched' must hold a row of ids for each query"),
    ):
        for call in (model.fit, model.evaluate, model.train_on_batch):
            with pytest.raises(ValueError, match=message):
                call({**DATA, name: values})
    with pytest.raises(TypeError, match=r"'watched' must hold ids, as integers"):
        model.fit({**DATA, "watched": WATCHED.astype("float32")}, verbose=0)
