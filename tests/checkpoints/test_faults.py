"""What remains of a training after faults: of files, folders, losses, arguments, and of a second training."""

import fcntl
import json
import re
import resource
import shutil
import sys

import keras
import numpy as np
import orbax.checkpoint
import pytest
from trainings import InterruptBefore, Interruption, WriteAtOnce, names_of

from keras_rs_contrib import TrainingCheckpoint, TwoTowerModel, Vocabulary

X, Y = np.arange(24.0).reshape(8, 3), np.arange(8.0)


def dense_model(units=1, rate=1e-3, names=("first", "second")):
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(units, name=names[0]), keras.layers.Dense(1, name=names[1])]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.build((None, 3))
    return model


def fit(model, *callbacks, epochs=3, **arguments):
    arguments = {"x": X, "y": Y, "batch_size": 2, "shuffle": False, **arguments}
    return model.fit(**arguments, epochs=epochs, verbose=0, callbacks=list(callbacks))


def weights_of(model):
    return np.concatenate([np.ravel(each) for each in model.get_weights()])


def truncate(path):
    file = max((each for each in (path / "state").rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def change_a_byte(path):
    content = bytearray((path / "info.json").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "info.json").write_bytes(content)


FAULTS = {
    "truncated": (truncate, "bytes instead of"),
    "changed": (change_a_byte, "'info.json' differs from its checksum"),
    "missing": (lambda path: (path / "arrays.npz").unlink(), "'arrays.npz' is missing"),
    "without checksums": (lambda path: (path / "checksums.json").unlink(), "`checksums.json` is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checkpoint_before_a_damaged_one_is_used(fault, tmp_path, capsys):
    expected = dense_model()
    fit(expected)
    with pytest.raises(Interruption):
        fit(dense_model(), WriteAtOnce(tmp_path), InterruptBefore(2, 1))
    damage, message = FAULTS[fault]
    damage(tmp_path / "epoch-2-batch-0")
    model = dense_model()
    fit(model, TrainingCheckpoint(tmp_path))
    output = capsys.readouterr().out
    assert message in output
    assert "The one before it is used" in output
    assert "epoch-1-batch-0, in epoch 2" in output
    np.testing.assert_array_equal(weights_of(model), weights_of(expected))
    assert (tmp_path / "damaged-epoch-2-batch-0").is_dir()


def test_training_begins_again_if_all_checkpoints_are_damaged(tmp_path, capsys):
    fit(dense_model(), TrainingCheckpoint(tmp_path), epochs=1)
    truncate(tmp_path / "epoch-1-batch-0")
    assert fit(dense_model(), TrainingCheckpoint(tmp_path), epochs=1).epoch == [0]
    assert "training begins again" in capsys.readouterr().out
    assert names_of(tmp_path) == ["epoch-1-batch-0"]


OTHERS = {
    "another shape": ({"units": 2}, r"there '.*first/kernel' \(3, 1\) float32, .*; here '.*first/kernel' \(3, 2\)"),
    "another name": ({"names": ("first", "last")}, r"there '\w+/second/kernel' .*; here '\w+/last/kernel'"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_changes_nothing(other, tmp_path):
    arguments, message = OTHERS[other]
    fit(dense_model(), TrainingCheckpoint(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = dense_model(**arguments)
    weights, step = weights_of(model), model.train_function
    with pytest.raises(ValueError, match=message):
        fit(model, TrainingCheckpoint(tmp_path))
    np.testing.assert_array_equal(weights_of(model), weights)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # The model is usable, and trains from its first epoch.
    assert fit(model).epoch == [0, 1, 2]
    assert step is None


def test_a_model_with_more_variables_names_them(tmp_path):
    fit(dense_model(), TrainingCheckpoint(tmp_path))
    model = keras.Sequential([dense_model(), keras.layers.Dense(1, name="third")])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"only here: '.*third/kernel'"):
        fit(model, TrainingCheckpoint(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"), [(["a", "c"], "name 1 is 'b' there and 'c' here"), (None, "it has one there or here only")]
)
def test_a_checkpoint_with_another_vocabulary_names_it(names, message, tmp_path):
    def train(names):
        vocabularies = {} if names is None else {"user": Vocabulary(names)}
        tables = [keras.layers.Embedding(4, 2, name=name) for name in ("users", "films")]
        model = TwoTowerModel(*tables, "user", "film", vocabularies=vocabularies)
        model.compile("sgd")
        users = np.array(["a", "a", "b"]) if names == ["a", "b"] else np.array([1, 2, 1])
        users = np.array(["a", "c", "a"]) if names == ["a", "c"] else users
        model.fit({"user": users, "film": np.arange(3)}, verbose=0, callbacks=[TrainingCheckpoint(tmp_path)])

    train(["a", "b"])
    with pytest.raises(ValueError, match=f"another vocabulary of 'user': {message}"):
        train(names)


def test_two_trainings_do_not_share_a_folder(tmp_path):
    class TrainsAnother(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with pytest.raises(RuntimeError, match="belongs to one training at a time"):
                fit(dense_model(), TrainingCheckpoint(tmp_path))

    model = dense_model()
    fit(model, TrainingCheckpoint(tmp_path), TrainsAnother())
    # Another process has locked it.
    with open(tmp_path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="belongs to one training at a time"):
            fit(dense_model(), TrainingCheckpoint(tmp_path))
    fit(dense_model(), TrainingCheckpoint(tmp_path))


def test_a_folder_without_permission_is_an_error_before_training(tmp_path):
    (tmp_path / "file").touch()
    # Not even the superuser can create a folder in these.
    for directory in ("/proc/checkpoints", tmp_path / "file" / "checkpoints"):
        with pytest.raises(OSError, match="must be a folder in which files can be written"):
            fit(dense_model(), TrainingCheckpoint(directory), InterruptBefore(0, 0))


# Orbax leaves what it has begun to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_costs_one_checkpoint_and_not_the_training(tmp_path):
    class FillDisk(keras.callbacks.Callback):
        """Limits the size of files in the third epoch: JAX has written all programs to its cache before."""

        def on_epoch_begin(self, epoch, logs=None):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if epoch == 2 else hard, hard))

    model = dense_model(units=1000, rate=1e-7)
    try:
        with pytest.warns(UserWarning, match=r"epoch-2-batch-0 is the last good checkpoint"):
            fit(model, WriteAtOnce(tmp_path), FillDisk(), epochs=4)
    finally:
        FillDisk().on_epoch_begin(0)
    assert names_of(tmp_path) == ["epoch-1-batch-0", "epoch-2-batch-0", "epoch-4-batch-0"]
    assert not list(tmp_path.glob("writing*"))
    expected = dense_model(units=1000, rate=1e-7)
    fit(expected, epochs=4)
    np.testing.assert_array_equal(weights_of(model), weights_of(expected))


def test_a_checkpoint_for_which_no_space_is_free_is_not_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.warns(UserWarning, match=r"the checkpoint has [\d,]+ bytes, and 10 are free.*no good checkpoint"):
        fit(dense_model(), TrainingCheckpoint(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("batch", [0, 2])
def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(batch, tmp_path):
    class Spoil(keras.callbacks.Callback):
        def on_train_batch_begin(self, number, logs=None):
            if number == batch and self.model.optimizer.iterations.numpy() >= 4:
                self.model.layers[0].kernel.assign(np.full((3, 1), np.nan))

    model = dense_model()
    message = rf"loss=nan in epoch 2, after batch {batch + 1}; .*epoch-1-batch-0 is the last good checkpoint"
    with pytest.raises(ValueError, match=message):
        fit(model, WriteAtOnce(tmp_path), Spoil())
    assert names_of(tmp_path) == ["epoch-1-batch-0"]
    # The same command, without what has spoiled it.
    model = dense_model()
    assert fit(model, TrainingCheckpoint(tmp_path)).epoch == [0, 1, 2]
    assert np.isfinite(weights_of(model)).all()


def test_an_error_in_fit_leaves_the_model_and_the_folder_usable(tmp_path):
    model = dense_model()
    with pytest.raises(Interruption):
        fit(model, TrainingCheckpoint(tmp_path), InterruptBefore(1, 2))
    fit(model, epochs=1)
    model.evaluate(X, Y, verbose=0)
    assert fit(model, TrainingCheckpoint(tmp_path)).epoch == [0, 1, 2]


def test_a_checkpoint_holds_the_values_of_its_step_while_training_goes_on(tmp_path):
    class Note(keras.callbacks.Callback):
        """Notes the sum of the weights after each step."""

        sums = None

        def on_train_batch_end(self, batch, logs=None):
            self.sums = [*(self.sums or []), float(np.sum(self.model.layers[0].embeddings.numpy(), dtype="float64"))]

    # Large enough that it is being written while the next steps overwrite the table.
    table = keras.layers.Embedding(300_000, 16)
    model = keras.Sequential([table, keras.layers.Flatten()])
    model.compile(keras.optimizers.SGD(1e4), "mse")
    note = Note()
    rows = np.random.default_rng(0).integers(0, 300_000, (64, 1000))
    targets = np.random.default_rng(1).normal(size=(64, 16_000)).astype("float32")
    arguments = {"x": rows, "y": targets, "batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(**arguments, callbacks=[TrainingCheckpoint(tmp_path, every_steps=1, keep=99), note])
    names = names_of(tmp_path)
    # How many of the others are written depends on the disk.
    assert {"epoch-0-batch-1", "epoch-1-batch-0"} <= set(names)
    for name in names:
        variables = json.loads((tmp_path / name / "info.json").read_text())["variables"]
        # Read with Orbax alone.
        restore_args = {str(n): orbax.checkpoint.RestoreArgs(restore_type=np.ndarray) for n in range(len(variables))}
        with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / name / "state", restore_args=restore_args)
        number = [tuple(shape) for _, shape, _ in variables].index((300_000, 16))
        epoch, batch = map(int, re.findall(r"\d+", name))
        assert np.sum(restored[str(number)], dtype="float64") == note.sums[batch - 1 if epoch == 0 else -1]


def test_data_that_keras_would_read_on_in_the_next_epoch_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="steps_per_epoch=3 for data of 4 batches"):
        fit(dense_model(), TrainingCheckpoint(tmp_path), steps_per_epoch=3)
    assert fit(dense_model(), TrainingCheckpoint(tmp_path), steps_per_epoch=4).epoch == [0, 1, 2]


def test_fewer_data_than_before_are_an_error(tmp_path):
    with pytest.raises(Interruption):
        fit(dense_model(), WriteAtOnce(tmp_path, every_steps=2), InterruptBefore(0, 3))
    with pytest.raises(ValueError, match="fewer batches than the checkpoint was trained on"):
        fit(dense_model(), TrainingCheckpoint(tmp_path), x=X[:2], y=Y[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_steps": 0}, "`every_steps` must be a positive int"),
        ({"every_epochs": 1.5}, "`every_epochs` must be a positive int"),
        ({"every_seconds": -1}, "`every_seconds` must be a positive number"),
        ({"every_seconds": float("nan")}, "`every_seconds` must be a positive number"),
        ({"keep": 0}, "`keep` must be a positive int"),
        ({"every_steps": 1, "every_seconds": 1}, "Checkpoints have one interval"),
        ({"directory": ""}, "`directory` must be the path of a folder"),
        ({"directory": "gs://bucket/run"}, "`directory` must be a folder of a file system"),
    ],
)
def test_arguments_are_checked(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainingCheckpoint(**{"directory": tmp_path, **arguments})


def test_two_callbacks_and_calls_outside_of_fit_are_errors(tmp_path):
    with pytest.raises(ValueError, match="one `TrainingCheckpoint`"):
        fit(dense_model(), TrainingCheckpoint(tmp_path / "a"), TrainingCheckpoint(tmp_path / "b"))
    with pytest.raises(RuntimeError, match="`TrainingCheckpoint` resumes `fit`"):
        TrainingCheckpoint(tmp_path).on_train_begin()


def test_without_orbax_an_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        TrainingCheckpoint(tmp_path)
