"""A training that is interrupted and started again ends like one that is not."""

import functools

import keras
import keras_rs
import numpy as np
import pytest
import tensorflow as tf
from conftest import data_parallel
from trainings import InterruptBefore, Interruption, WriteAtOnce, assert_equal, end_of, names_of

from keras_rs_contrib import (
    CrossBatchMemory,
    MixedNegatives,
    RowAdagrad,
    RowSparseEmbedding,
    StreamingSamplingProbability,
    TrainingCheckpoint,
    TwoTowerModel,
    shard_candidates,
)

EPOCHS = 4
ROWS = np.random.default_rng(0).integers(0, 20, (22, 3))
TARGETS = ROWS.sum(axis=1, keepdims=True).astype("float32")
# 6 batches, the last of which is smaller.
BATCH = 4


def plain_model(steps_per_execution=1):
    layers = [keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse", metrics=["mae"], steps_per_execution=steps_per_execution)
    return model


def two_towers():
    tables = [RowSparseEmbedding(20, 4, optimizer=RowAdagrad(0.1)) for _ in range(2)]
    sampling_probability = StreamingSamplingProbability(20, window=30)
    model = TwoTowerModel(
        *tables,
        "query",
        "candidate",
        cross_batch_memory=CrossBatchMemory(6, warmup_steps=2),
        mixed_negatives=MixedNegatives(sampling_probability, 3, seed=1),
    )
    model.compile("adam")
    return model


class Batches(keras.utils.PyDataset):
    """Draws random numbers in the order in which its batches are read."""

    def __len__(self):
        return 6

    def __getitem__(self, number):
        rows = slice(number * BATCH, number * BATCH + BATCH)
        return ROWS[rows], TARGETS[rows] + np.random.normal(size=TARGETS[rows].shape)  # noqa: NPY002


def dataset(columns):
    return tf.data.Dataset.from_tensor_slices(columns).shuffle(22, seed=3)


def generator():
    while True:
        for start in range(0, 20, BATCH):
            yield ROWS[start : start + BATCH], TARGETS[start : start + BATCH]


PAIRS = {"query": ROWS[:, 0].astype("int32"), "candidate": ROWS[:, 1].astype("int32")}
# The model, and arguments of `fit`.
TRAININGS = {
    "arrays": (plain_model, lambda: {"x": ROWS, "y": TARGETS, "batch_size": BATCH}),
    "arrays, shuffled in batches": (
        plain_model,
        lambda: {"x": ROWS, "y": TARGETS, "batch_size": BATCH, "shuffle": "batch"},
    ),
    "two steps per execution": (
        functools.partial(plain_model, 2),
        lambda: {"x": ROWS, "y": TARGETS, "batch_size": BATCH},
    ),
    "PyDataset": (plain_model, lambda: {"x": Batches(), "shuffle": True}),
    "tf.data": (plain_model, lambda: {"x": dataset((ROWS, TARGETS)).batch(BATCH)}),
    "tf.data of unknown length": (
        plain_model,
        lambda: {"x": dataset((ROWS, TARGETS)).batch(BATCH).filter(lambda *_: True)},
    ),
    "tf.data, repeated": (plain_model, lambda: {"x": dataset((ROWS, TARGETS)).repeat().batch(5), "steps_per_epoch": 6}),
    "generator": (plain_model, lambda: {"x": generator(), "steps_per_epoch": 6}),
    "two towers": (
        two_towers,
        lambda: {"x": PAIRS, "batch_size": BATCH, "seen": "training"},
    ),
    "two towers, tf.data": (two_towers, lambda: {"x": dataset(PAIRS).batch(BATCH)}),
    "two towers, repeated": (two_towers, lambda: {"x": dataset(PAIRS).repeat().batch(5), "steps_per_epoch": 6}),
}


def train(name, callbacks, epochs=EPOCHS):
    make_model, make_data = TRAININGS[name]
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    model, data = make_model(), make_data()
    if not isinstance(data["x"], (np.ndarray, dict, keras.utils.PyDataset)):
        # Keras warns that it does not shuffle these.
        data["shuffle"] = False
    return end_of(model, model.fit(**data, epochs=epochs, callbacks=callbacks, verbose=0))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("arrays", [(0, 4), (2, 0), (2, 4)]),
        ("arrays, shuffled in batches", [(2, 4)]),
        ("two steps per execution", [(2, 4)]),
        ("PyDataset", [(2, 4)]),
        ("tf.data", [(2, 0), (2, 4)]),
        ("tf.data of unknown length", [(2, 4)]),
        ("tf.data, repeated", [(2, 4)]),
        ("generator", [(2, 0), (2, 4)]),
        pytest.param("two towers", [(0, 4), (2, 4)], marks=pytest.mark.slow),
        pytest.param("two towers, tf.data", [(2, 0)], marks=pytest.mark.slow),
        pytest.param("two towers, repeated", [(2, 4)], marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_ends_like_an_undisturbed_one(name, places, tmp_path):
    def callbacks(*own):
        # The rates of row optimizers follow that of the optimizer.
        return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 3), *own]

    expected = train(name, callbacks())
    for place in places:
        with pytest.raises(Interruption):
            train(name, callbacks(WriteAtOnce(tmp_path, every_steps=2), InterruptBefore(*place)))
        assert names_of(tmp_path)
    assert_equal(train(name, callbacks(TrainingCheckpoint(tmp_path, every_steps=2))), expected)


class DrawsRandomNumbers(keras.callbacks.Callback):
    """Has state of its own, changes the learning rate by a factor in each epoch, and draws from the generators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(("epoch", epoch, float(np.random.random())))  # noqa: NPY002
        self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate) * 0.9

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append(("batch", batch, float(np.random.random())))  # noqa: NPY002

    def on_train_end(self, logs=None):
        order = [[("epoch", epoch), *(("batch", batch) for batch in range(6))] for epoch in range(EPOCHS)]
        assert [each[:2] for each in self.seen] == [each for epoch in order for each in epoch]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("place", [(1, 5), (3, 0)], ids=str)
def test_other_callbacks_continue_with_their_state(place, is_first, tmp_path):
    def callbacks(*own):
        others = [
            DrawsRandomNumbers(),
            keras.callbacks.ReduceLROnPlateau("mae", factor=0.5, patience=1, min_delta=1e3),
            keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True, min_delta=1e3),
        ]
        return [*own, *others] if is_first else [*others, *own]

    expected = train("arrays", callbacks())
    with pytest.raises(Interruption):
        train("arrays", callbacks(WriteAtOnce(tmp_path, every_steps=4), InterruptBefore(*place)))
    assert_equal(train("arrays", callbacks(TrainingCheckpoint(tmp_path, every_steps=4))), expected)


def test_a_changed_argument_of_a_callback_stays_in_force(tmp_path):
    with pytest.raises(Interruption):
        train(
            "arrays", [WriteAtOnce(tmp_path), keras.callbacks.EarlyStopping("loss", patience=9), InterruptBefore(2, 0)]
        )
    stopping = keras.callbacks.EarlyStopping("loss", patience=50)
    train("arrays", [TrainingCheckpoint(tmp_path), stopping])
    assert stopping.patience == 50
    assert stopping.best_epoch > 0


def test_a_complete_training_is_not_trained_again_and_continues_with_more_epochs(tmp_path, capsys):
    expected, longer = train("arrays", []), train("arrays", [], epochs=6)
    train("arrays", [TrainingCheckpoint(tmp_path)])
    assert names_of(tmp_path) == ["epoch-2-batch-0", "epoch-3-batch-0", "epoch-4-batch-0"]
    capsys.readouterr()
    assert_equal(train("arrays", [TrainingCheckpoint(tmp_path), InterruptBefore(0, 0)]), expected)
    assert "The training of 4 epochs" in capsys.readouterr().out
    assert_equal(train("arrays", [TrainingCheckpoint(tmp_path)], epochs=6), longer)


def test_a_training_that_was_stopped_early_is_complete(tmp_path):
    def callbacks(*own):
        return [keras.callbacks.EarlyStopping("loss", min_delta=1e3, restore_best_weights=True), *own]

    expected = train("arrays", callbacks())
    assert len(expected["epochs"]) < EPOCHS
    train("arrays", callbacks(TrainingCheckpoint(tmp_path)))
    assert_equal(train("arrays", callbacks(TrainingCheckpoint(tmp_path), InterruptBefore(2, 0))), expected)


def test_a_later_fit_without_checkpoints_starts_at_its_first_epoch(tmp_path):
    model = plain_model()
    arguments = {"x": ROWS, "y": TARGETS, "verbose": 0}
    model.fit(**arguments, epochs=2, callbacks=[TrainingCheckpoint(tmp_path)])
    step = model.train_function
    model.fit(**arguments, epochs=2, callbacks=[TrainingCheckpoint(tmp_path)])
    assert model.train_function is step
    assert model.fit(**arguments, epochs=2).epoch == [0, 1]


@pytest.mark.parametrize("schedule", [{"every_steps": 5}, {"every_epochs": 2}, {"every_seconds": 1e-9}], ids=str)
def test_checkpoints_are_written_when_they_are_due_and_the_newest_remain(schedule, tmp_path):
    train("arrays", [WriteAtOnce(tmp_path, **schedule, keep=3)], epochs=3)
    expected = {
        # After steps 10, 15 and 18, of 6 in an epoch.
        "every_steps": ["epoch-1-batch-4", "epoch-2-batch-3", "epoch-3-batch-0"],
        "every_epochs": ["epoch-2-batch-0", "epoch-3-batch-0"],
        "every_seconds": ["epoch-2-batch-4", "epoch-2-batch-5", "epoch-3-batch-0"],
    }
    assert names_of(tmp_path) == expected[next(iter(schedule))]


@pytest.mark.slow
def test_a_checkpoint_of_8_devices_continues_on_others(tmp_path):
    def train_on(num_devices, epochs, *callbacks):
        keras.utils.clear_session(free_memory=False)
        keras.distribution.set_distribution(data_parallel(num_devices))
        keras.utils.set_random_seed(7)
        # The table is split over the devices, and the kernel is replicated.
        table = RowSparseEmbedding(20, 4, optimizer=RowAdagrad(0.1), mesh_axis="batch")
        model = keras.Sequential([table, keras.layers.Flatten(), keras.layers.Dense(1)])
        model.compile("adam", "mse")
        arguments = {"x": ROWS[:16], "y": TARGETS[:16], "batch_size": 8, "verbose": 0}
        return {"loss": model.fit(**arguments, epochs=epochs, callbacks=list(callbacks)).history["loss"]}

    expected = train_on(8, 4)
    with pytest.raises(Interruption):
        train_on(8, 4, WriteAtOnce(tmp_path, every_steps=1), InterruptBefore(1, 0))
    for epochs, num_devices in enumerate((1, 2, 4, 8), start=1):
        result = train_on(num_devices, epochs, TrainingCheckpoint(tmp_path))
    assert_equal(result, expected, rtol=1e-5)


def feature_towers():
    inputs = keras.Input((), dtype="int32", name="genre")
    tower = keras.Model({"genre": inputs}, keras.layers.Embedding(5, 4)(inputs))
    retrieval = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=3),
        tower,
        candidates={"genre": np.arange(11) % 5},
        candidate_ids=np.arange(100, 111),
    )
    return TwoTowerModel(
        keras.layers.Embedding(20, 4), tower, "query", ["genre"], candidate_id="movie", retrieval=retrieval
    )


def test_the_index_of_a_feature_tower_is_computed_again(tmp_path):
    pairs = {"query": PAIRS["query"], "movie": 100 + PAIRS["candidate"] % 11, "genre": PAIRS["candidate"] % 11 % 5}

    def train_on(num_devices, *callbacks):
        keras.distribution.set_distribution(data_parallel(num_devices))
        keras.utils.set_random_seed(7)
        model = feature_towers()
        model.compile("adam")
        model.fit(pairs, epochs=3, batch_size=6, verbose=0, callbacks=list(callbacks))
        return model.recommend(np.arange(20))

    expected = train_on(3)
    with pytest.raises(Interruption):
        train_on(3, WriteAtOnce(tmp_path), InterruptBefore(2, 0))
    result = train_on(8, TrainingCheckpoint(tmp_path))
    np.testing.assert_array_equal(result.ids, expected.ids)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-5)
