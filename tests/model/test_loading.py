"""`load_model` returns the model that was saved, or raises one clear error."""

import io
import json
import pathlib
import random
import re
import sys
import tempfile
import zipfile
import zlib

import h5py
import keras
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import (
    RowAdagrad,
    RowSparseEmbedding,
    ShardedEmbedding,
    TwoTowerModel,
    Vocabulary,
    _keras,
    load_model,
    vocabulary,
)
from keras_rs_contrib.model.checksums import RECORD

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "benchmarks"))

import mutations
from mutations import CONFIG, WEIGHTS, archive_of, members_of, without_checksums

USERS = ["ann", "bob", "eve"]
OLD_FILES = pathlib.Path(__file__).parents[1] / "files"


def make_model():
    users, films = Vocabulary(USERS), Vocabulary(["Alien", "Heat", "Up", "Brazil"])
    model = TwoTowerModel(
        RowSparseEmbedding(len(users), 4, optimizer=RowAdagrad(0.1), name="users"),
        ShardedEmbedding(len(films), 4, name="films"),
        query_features="user",
        candidate_features="film",
        vocabularies={"user": users, "film": films},
    )
    model.compile("adam")
    return model


def answers(model):
    return model.recommend([*USERS, "nobody"], k=2)


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    model = make_model()
    model.fit({"user": ["ann", "bob", "eve", "ann"], "film": ["Heat", "Up", "Alien", "Up"]}, verbose=0)
    return model


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """The bytes of a file, and the answers of its model."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    trained.save(path)
    return path.read_bytes(), answers(trained)


@pytest.fixture
def load(tmp_path):
    """Loads a file from its bytes."""

    def load_bytes(file, **kwargs):
        path = tmp_path / "model.keras"
        path.write_bytes(file)
        return load_model(path, **kwargs)

    return load_bytes


def record_in(weights):
    with h5py.File(weights) as h5:
        return json.loads(h5[RECORD][()].tobytes())


def with_config(file, change):
    """The file with another config, without a checksum of it."""
    members = members_of(file)
    config = json.loads(members[CONFIG])
    change(config)
    return archive_of({**members, CONFIG: json.dumps(config).encode()})


def with_weights(file, change):
    members = members_of(file)
    weights = io.BytesIO(members[WEIGHTS])
    with h5py.File(weights, "r+") as h5:
        change(h5)
    return archive_of({**members, WEIGHTS: weights.getvalue()})


# Fuzzing.


@pytest.mark.slow
@pytest.mark.parametrize("kind", mutations.KINDS)
def test_a_damaged_file_answers_as_before_or_raises_the_one_error(kind, saved, tmp_path):
    file, expected = saved
    path = tmp_path / "model.keras"
    for number in range(19):
        path.write_bytes(mutations.KINDS[kind](file, random.Random(number)))
        result, text = mutations.outcome(path, load_model, answers, expected)
        assert result in ("equal", "clear"), (number, text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", mutations.KINDS)
def test_a_damaged_file_without_checksums_raises_no_other_error(kind, saved, tmp_path):
    file, expected = without_checksums(saved[0]), saved[1]
    path = tmp_path / "model.keras"
    for number in range(5):
        path.write_bytes(mutations.KINDS[kind](file, random.Random(number)))
        result, text = mutations.outcome(path, load_model, answers, expected)
        assert result != "other", (number, text)


def test_the_fuzz_test_tells_equal_answers_from_others_and_clear_errors_from_others(saved, tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(saved[0])
    assert mutations.outcome(path, load_model, answers, saved[1]) == ("equal", "")
    others = saved[1][0], saved[1][1] + 1
    assert mutations.outcome(path, load_model, answers, others) == ("different", "")
    path.write_bytes(saved[0][:100])
    assert mutations.outcome(path, load_model, answers, saved[1])[0] == "clear"
    assert mutations.outcome(path, keras.saving.load_model, answers, saved[1])[0] == "other"


# What is wrong with a file.


@pytest.mark.parametrize(
    ("name", "content", "received"),
    [
        ("none.keras", None, "does not exist"),
        ("folder.keras", "folder", "a directory"),
        ("model.weights.h5", b"x", "does not end in `.keras`"),
        ("empty.keras", b"", "is empty"),
        ("text.keras", b"text", "not a zip archive, or truncated"),
        ("other.keras", archive_of({"a": b"x"}), "does not contain `config.json`"),
        ("no_weights.keras", archive_of({CONFIG: b"{}"}), "does not contain `model.weights.h5`"),
        ("list.keras", archive_of({CONFIG: b"[]", WEIGHTS: b""}), "does not describe a model"),
        ("no_json.keras", archive_of({CONFIG: b"{", WEIGHTS: b""}), "is not JSON"),
        ("twice.keras", archive_of({CONFIG: b'{"a": 1, "a": 1}', WEIGHTS: b""}), "the same key twice"),
        ("deep.keras", archive_of({CONFIG: b"[" * 10**6, WEIGHTS: b""}), "is not JSON"),
        ("outside.keras", archive_of({CONFIG: b"{}", WEIGHTS: b"", "../x": b""}), "outside of its folder"),
        (
            "no_weights.keras",
            archive_of({CONFIG: b'{"class_name": "", "config": {}}', WEIGHTS: b"text"}),
            "weights are damaged",
        ),
        (
            "bomb.keras",
            archive_of({CONFIG: b"{}", WEIGHTS: bytes(10**8)}, zipfile.ZIP_DEFLATED),
            "claims 100,000,002 bytes of content",
        ),
    ],
)
def test_the_error_says_what_is_wrong_and_what_to_do(name, content, received, tmp_path):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(received)) as error:
        load_model(path)
    assert mutations.is_clear(error.value, path)
    assert str(error.value).count("Received: ") == 1


def test_a_path_must_be_a_path():
    with pytest.raises(TypeError, match=r"must be a path. Received: 3"):
        load_model(3)


def test_the_original_error_is_the_cause(saved, load):
    with pytest.raises(ValueError, match="truncated") as error:
        load(saved[0][:-100])
    assert isinstance(error.value.__cause__, zipfile.BadZipFile)
    with pytest.raises(ValueError, match="weights are damaged") as error:
        load(archive_of({**members_of(saved[0]), WEIGHTS: members_of(saved[0])[WEIGHTS][:1000]}))
    assert isinstance(error.value.__cause__, OSError)


# Sizes.


def set_size(config, size=2**40):
    config["config"]["candidate_tower"]["config"]["input_dim"] = size


def set_thresholds(config):
    auc = {"module": "keras.metrics", "class_name": "AUC", "config": {"num_thresholds": 2**40}}
    config["config"]["batch_metrics"] = [auc]


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (set_size, "asks for input_dim=1099511627776"),
        (set_thresholds, "asks for num_thresholds=1099511627776"),
        (lambda config: set_size(config, 9), r"could not be loaded.*films"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_an_error(change, received, saved, load):
    file = with_config(without_checksums(saved[0]), change)
    with pytest.raises(ValueError, match=received):
        load(file)


def test_weights_are_counted_before_any_is_allocated(load):
    file = with_config((OLD_FILES / "plain.keras").read_bytes(), set_size)
    with pytest.raises(ValueError, match=r"asks for 17,592,186,\d+,\d+ bytes of weights, and which has 3,560"):
        load(file)


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda h5: h5.create_dataset("x", (2**40,), "float32"), "claims 4,398,046,5.* bytes of weights"),
        (lambda h5: h5.create_dataset("x", (2,), "int8", external=[("other", 0, 2)]), "are in another file"),
    ],
)
def test_weights_that_the_file_does_not_have_are_an_error(change, received, saved, load):
    with pytest.raises(ValueError, match=received):
        load(with_weights(saved[0], change))


@keras.saving.register_keras_serializable(package="tests")
class Constant(keras.layers.Layer):
    """A layer whose variable has a value from the beginning, which Keras does not create in a stateless scope."""

    def __init__(self, size=3, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.constant = keras.Variable(np.ones(size), trainable=False)

    def call(self, x):
        return x * self.constant

    def get_config(self):
        return {**super().get_config(), "size": self.size}


def test_a_model_that_needs_its_values_to_be_created_loads_with_bounded_sizes(tmp_path, load):
    model = keras.Sequential([keras.Input((3,)), Constant()])
    model.layers[0].constant.assign([1, 2, 3])
    model.save(tmp_path / "constant.keras")
    file = (tmp_path / "constant.keras").read_bytes()
    np.testing.assert_array_equal(load(file)(np.ones((1, 3))), [[1, 2, 3]])

    def enlarge(config):
        config["config"]["layers"][1]["config"]["size"] = 2**40

    with pytest.raises(
        ValueError, match="asks for size=1099511627776, while the largest dimension of its weights is 3"
    ):
        load(with_config(file, enlarge))


# Checksums.


def flip_a_bit(h5, name="candidate_tower/vars/0"):
    values = h5[name][()]
    values.view("uint8").reshape(-1)[0] ^= 1
    h5[name][...] = values


@pytest.mark.parametrize("name", ["candidate_tower/vars/0", "optimizer/vars/2", "vars/popular_counts"])
def test_a_flipped_bit_of_a_weight_is_an_error(name, saved, load):
    file = with_weights(saved[0], lambda h5: flip_a_bit(h5, name))
    with pytest.raises(ValueError, match=rf"1 of \d+ weights differ from their checksum, such as '{name}'"):
        load(file)
    # Nothing else is wrong with it.
    load(without_checksums(file), compile=not name.startswith("optimizer"))


def test_a_flipped_bit_of_the_config_is_an_error(saved, load):
    file = with_config(saved[0], lambda config: config["config"].update(exclude_seen=False))
    with pytest.raises(ValueError, match=r"`config\.json` differs from its checksum"):
        load(file)


@pytest.mark.parametrize("place", range(0, 1500, 100))
def test_a_flipped_bit_of_the_checksums_is_an_error(place, saved, load):
    def flip(h5):
        values = h5[RECORD][()]
        values[place] ^= 1
        h5[RECORD][...] = values

    with pytest.raises(ValueError, match="checksum"):
        load(with_weights(saved[0], flip))


def test_missing_checksums_are_an_error(saved, load):
    def remove(h5):
        del h5[RECORD]

    with pytest.raises(ValueError, match="whose checksums are missing"):
        load(with_weights(saved[0], remove))


def test_nan_is_an_error_without_checksums(saved, load):
    file = with_config(without_checksums(saved[0]), lambda config: config["config"]["task"]["config"].update(x=np.nan))
    with pytest.raises(ValueError, match="has NaN"):
        load(file)


def test_large_vocabularies_have_checksums(monkeypatch, tmp_path, load):
    monkeypatch.setattr(vocabulary, "MAX_NAMES_IN_CONFIG", 1)
    model = make_model()
    model({"user": np.array([1]), "film": np.array([1])})
    model.save(tmp_path / "large.keras")
    file = (tmp_path / "large.keras").read_bytes()
    assert load(file).vocabularies["user"].names == USERS
    members = members_of(file)
    one, other = sorted(name for name in members if name.startswith("assets/"))
    members[one], members[other] = members[other], members[one]
    with pytest.raises(ValueError, match=r"the asset '.+' differs from its checksum"):
        load(archive_of(members))
    del members[one]
    with pytest.raises(ValueError, match=r"the asset '.+' differs from its checksum"):
        load(archive_of(members))


def test_every_way_of_saving_writes_checksums(trained, tmp_path):
    trained.save(tmp_path / "save.keras")
    keras.saving.save_model(trained, tmp_path / "function.keras")
    callback = keras.callbacks.ModelCheckpoint(tmp_path / "callback.keras")
    callback.set_model(trained)
    callback.on_epoch_end(0, {})
    trained.save_weights(tmp_path / "model.weights.h5")
    records = []
    for path in sorted(tmp_path.glob("*.keras")):
        members = members_of(path.read_bytes())
        records.append(record_in(io.BytesIO(members[WEIGHTS])))
        assert records[-1].pop("config") == zlib.crc32(members[CONFIG])
    only_weights = record_in(tmp_path / "model.weights.h5")
    assert only_weights.pop("config") is None
    assert len(records) == 3
    assert all(record == only_weights for record in records)
    assert len(only_weights["weights"]) > 10


def test_checksums_do_not_depend_on_the_devices_or_on_padding(saved, tmp_path):
    records = [record_in(io.BytesIO(members_of(saved[0])[WEIGHTS]))["weights"]]
    (tmp_path / "model.keras").write_bytes(saved[0])
    for num_devices in (1, 8):
        keras.distribution.set_distribution(data_parallel(num_devices))
        model = load_model(tmp_path / "model.keras")
        assert model.query_tower.embeddings.shape[0] == 192
        model.save(tmp_path / "again.keras")
        records.append(record_in(io.BytesIO(members_of((tmp_path / "again.keras").read_bytes())[WEIGHTS]))["weights"])
    assert records[0] == records[1] == records[2]


def test_load_weights_compares_checksums_before_it_changes_the_model(trained, saved, tmp_path):
    path = tmp_path / "model.weights.h5"
    trained.save_weights(path)
    before = [np.asarray(value) for value in trained.variables]
    trained.load_weights(path)
    with h5py.File(path, "r+") as h5:
        flip_a_bit(h5)
    with pytest.raises(ValueError, match=r"must be as they were saved.*'candidate_tower/vars/0'"):
        trained.load_weights(path)
    path = tmp_path / "model.keras"
    path.write_bytes(with_weights(saved[0], flip_a_bit))
    with pytest.raises(ValueError, match=r"must be as they were saved"):
        trained.load_weights(path)
    assert all(np.array_equal(value, old) for value, old in zip(trained.variables, before, strict=True))


# Files that are not damaged.


def test_a_good_file_loads_with_either_function(saved, tmp_path, load):
    path = tmp_path / "good.keras"
    path.write_bytes(saved[0])
    for model in (load(saved[0]), keras.saving.load_model(path), load(without_checksums(saved[0]))):
        for one, other in zip(answers(model), saved[1], strict=True):
            np.testing.assert_array_equal(one, other)
        assert model.optimizer.iterations == 1


@pytest.mark.parametrize("path", sorted(OLD_FILES.glob("*.keras")), ids=lambda path: path.stem)
def test_old_files_load_as_with_keras(path):
    one, other = load_model(path), keras.saving.load_model(path)
    for value, expected in zip(one.variables, other.variables, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_members_that_keras_does_not_know_are_ignored(saved, load):
    load(archive_of({**members_of(saved[0]), "notes.txt": b"x", "__MACOSX/config.json": b"x"}))


def test_a_model_that_was_never_trained_loads_without_warnings(tmp_path):
    model = make_model()
    model({"user": np.array([1]), "film": np.array([1])})
    model.save(tmp_path / "model.keras")
    assert load_model(tmp_path / "model.keras").compiled
    assert not load_model(tmp_path / "model.keras", compile=False).compiled


def test_a_plain_model_with_a_layer_of_the_package_loads(tmp_path):
    model = keras.Sequential([keras.Input((), dtype="int32"), ShardedEmbedding(7, 3)])
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(load_model(tmp_path / "model.keras")(np.arange(7)), model(np.arange(7)))


# Errors that are not damage.


class Unregistered(keras.layers.Dense):
    """A layer that Keras does not find by its name."""


def test_unknown_classes_are_named(tmp_path):
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((2,)), Unregistered(3)]).save(path)
    with pytest.raises(ValueError, match=r"the class 'Unregistered', which is not known here.*custom_objects") as error:
        load_model(path)
    assert mutations.is_clear(error.value, path)
    assert "damaged" not in str(error.value)
    assert "Could not locate" in str(error.value.__cause__)
    assert isinstance(load_model(path, custom_objects={"Unregistered": Unregistered}).layers[0], Unregistered)


def test_code_in_the_file_needs_safe_mode_to_be_off(tmp_path):
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: 2 * x)]).save(path)
    with pytest.raises(ValueError, match=r"contains Python code.*`safe_mode=False`") as error:
        load_model(path)
    assert mutations.is_clear(error.value, path)
    assert load_model(path, safe_mode=False)(np.ones((1, 2))).tolist() == [[2, 2]]


def test_a_distribution_that_does_not_fit_keeps_its_message():
    keras.distribution.set_distribution(data_parallel(2))
    with pytest.raises(ValueError, match=r"Load the file without a distribution.*such as the distribution"):
        load_model(OLD_FILES / "sharded.keras")


def test_an_intact_file_whose_model_cannot_be_created_says_why(saved, load, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("`TwoTowerModel` needs another backend. Received: this one. Set KERAS_BACKEND.")

    monkeypatch.setattr(TwoTowerModel, "from_config", fail)
    with pytest.raises(ValueError, match=r"is intact.*NotImplementedError.*Set KERAS_BACKEND\. Change what"):
        load(saved[0])


def test_weights_that_keras_would_skip_are_an_error(saved, load):
    def remove(h5):
        del h5["optimizer/vars/3"]

    with pytest.raises(ValueError, match="cannot be loaded: Skipping variable loading for optimizer"):
        load(with_weights(without_checksums(saved[0]), remove))


# What remains.


def test_nothing_remains_of_a_failure(saved, load, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    file = archive_of({**members_of(saved[0]), "assets/x": b"x"})
    unchecked = without_checksums(file)
    random.seed(3)
    state = random.getstate()
    for broken in (
        file[:-50],
        with_weights(file, flip_a_bit),
        with_config(unchecked, set_size),
        with_config(unchecked, lambda config: config["config"].update(candidate_tower=None)),
    ):
        random.setstate(state)
        with pytest.raises(ValueError, match="intact"):
            load(broken)
    with pytest.raises(ValueError, match="could not be loaded"):
        load(with_config(unchecked, lambda config: set_size(config, 9)))
    assert not _keras.uninitialized_variables()
    assert not _keras.is_loading()
    assert not _keras.is_in_stateless_scope()
    assert list(folder.iterdir()) == []
    model = load(file)
    model.fit({"user": ["ann"], "film": ["Up"]}, verbose=0)
    assert model.optimizer.iterations == 2
    assert list(folder.iterdir()) == []


def test_sizes_are_checked_without_drawing_random_numbers(saved, load):
    random.seed(3)
    state = random.getstate()
    with pytest.raises(ValueError, match="asks for"):
        load(with_config(without_checksums(saved[0]), set_size))
    assert random.getstate() == state
