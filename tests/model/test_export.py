"""Exported models, in processes without Keras, JAX and this package, against `recommend`."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap

import keras
import keras_rs
import numpy as np
import pytest
from conftest import data_parallel
from own_towers import OnJax, Projected

from keras_rs_contrib import TwoTowerModel, Vocabulary, shard_candidates

NUM_USERS, NUM_ITEMS = 30, 53
RNG = np.random.default_rng(0)

CLIENT = """
    import json, pickle, sys

    # An import of one of them fails.
    sys.modules.update(dict.fromkeys(("keras", "jax", "keras_rs_contrib")))
    import numpy as np
    import onnxruntime
    import tensorflow as tf

    onnxruntime.set_default_logger_severity(3)
    with open(sys.argv[1], "rb") as file:
        requests = pickle.load(file)
    answers = []
    for path, features, exclude_ids in requests:
        if path.endswith(".onnx"):
            session = onnxruntime.InferenceSession(path)
            excluded = {} if exclude_ids is None else {"exclude_ids": exclude_ids}
            answers.append(session.run(["ids", "scores"], {**features, **excluded}))
            continue
        signatures = tf.saved_model.load(path).signatures
        function = signatures["serving_default"]
        if exclude_ids is not None:
            function = signatures["excluding"]
            features = {**features, "exclude_ids": exclude_ids}
        specs = function.structured_input_signature[1]
        found = function(**{name: tf.constant(values, specs[name].dtype) for name, values in features.items()})
        ids = found["ids"].numpy()
        answers.append([ids.astype(str) if ids.dtype == object else ids, found["scores"].numpy()])
    with open(sys.argv[2], "wb") as file:
        pickle.dump(answers, file)
"""


def answers(requests, folder):
    """The answers of exported models to requests: triples of a path, features and excluded ids."""
    with open(folder / "requests.pickle", "wb") as file:
        pickle.dump([(str(path), *rest) for path, *rest in requests], file)
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), folder / "requests.pickle", folder / "answers.pickle"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert result.returncode == 0, result.stderr
    with open(folder / "answers.pickle", "rb") as file:
        return pickle.load(file)


def check(found, expected):
    ids = np.where(expected.ids == None, "", expected.ids) if expected.ids.dtype == object else expected.ids  # noqa: E711
    # Scores that are rounded differently may change places with their neighbours. Equal ones may not.
    gaps = np.abs(np.diff(expected.scores, axis=1))
    is_near = np.pad((gaps > 0) & (gaps < 1e-6), ((0, 0), (1, 1)))
    is_near = is_near[:, 1:] | is_near[:, :-1]
    np.testing.assert_array_equal(np.where(is_near, "", found[0]), np.where(is_near, "", ids))
    np.testing.assert_allclose(found[1], expected.scores, atol=1e-5)


def named_model():
    users = Vocabulary([f"u{i}" for i in range(NUM_USERS)])
    items = Vocabulary([f"i{i}" for i in range(NUM_ITEMS)])
    model = TwoTowerModel(
        keras.layers.Embedding(len(users), 16),
        keras.layers.Embedding(len(items), 16),
        query_features="user",
        candidate_features="item",
        vocabularies={"user": users, "item": items},
    )
    model.compile("adam")
    # The last users have no row.
    data = {"user": [f"u{i}" for i in RNG.integers(0, 20, 90)], "item": [f"i{i}" for i in RNG.integers(0, 53, 90)]}
    model.fit(data, seen="training", verbose=0)
    # Equal rows have equal scores.
    table = np.array(model.candidate_tower.embeddings)
    table[[5, 20, 40]] = table[10]
    model.candidate_tower.embeddings.assign(table)
    return model


@pytest.mark.slow
def test_exports_answer_like_recommend(tmp_path):
    model = named_model()
    model.export(tmp_path / "saved", k=7, verbose=0)
    model.export(tmp_path / "model.onnx", "onnx", k=7, verbose=0)
    keras.distribution.set_distribution(data_parallel(4))
    table = RNG.standard_normal((5000, 3)).astype("float32")
    table[RNG.integers(0, 5000, 999)] = table[0]
    tower = keras.Sequential([keras.layers.Dense(16)])
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=10),
        tower,
        candidates=table,
        candidate_ids=np.arange(5000)[::-1] * 3,
        exclude_ids=[0, 6],
        similarity="biased_cosine",
        mesh_axis="batch",
    )
    own = TwoTowerModel(Projected(), tower, "user.id", "features", candidate_id="item", retrieval=index)
    own.recommend({"user.id": [1, 2]})
    # The index is stale now.
    tower.layers[0].kernel.assign(-tower.layers[0].kernel)
    own.export(tmp_path / "own", verbose=0)
    own.export(tmp_path / "own.onnx", "onnx", k=20, verbose=0)

    users = [["u1"], [f"u{i}" for i in range(7)], [f"u{i % 40}" for i in range(64)], ["nobody"] * 3]
    excluded = [[["i1", "i2", ""]] * len(each) for each in users]
    rows = [model.vocabularies["user"].encode(each) for each in users]
    excluded_rows = [model.vocabularies["item"].encode(each, padded=True) for each in excluded]
    excluded_rows = [np.where(each <= 0, -1, each).astype("int32") for each in excluded_rows]
    many = RNG.integers(0, NUM_USERS, 1000).astype("int32")
    requests = [(tmp_path / "saved", {"user": each}, None) for each in users]
    requests += [(tmp_path / "saved", {"user": each}, ids) for each, ids in zip(users, excluded, strict=True)]
    requests += [(tmp_path / "model.onnx", {"user": each}, None) for each in rows]
    requests += [(tmp_path / "model.onnx", {"user": each}, ids) for each, ids in zip(rows, excluded_rows, strict=True)]
    requests += [(tmp_path / "own", {"user_id": many}, None), (tmp_path / "own", {"user_id": many}, [[9, -1]] * 1000)]
    requests += [(tmp_path / "own.onnx", {"user_id": many[:7]}, None)]
    found = iter(answers(requests, tmp_path))
    for with_excluded in (False, True):
        for each, ids in zip(users, excluded, strict=True):
            check(next(found), model.recommend({"user": each}, k=7, exclude_ids=ids if with_excluded else None))
    names = [None, None, *model.vocabularies["item"].names]
    for with_excluded in (False, True):
        for each, ids in zip(users, excluded, strict=True):
            expected = model.recommend({"user": each}, k=7, exclude_ids=ids if with_excluded else None)
            ids, scores = next(found)
            check((np.array([[names[i + 1] or "" for i in row] for row in ids]), scores), expected)
    check(next(found), own.recommend({"user.id": many}))
    check(next(found), own.recommend({"user.id": many}, exclude_ids=[[9]] * 1000))
    check(next(found), own.recommend({"user.id": many[:7]}, k=20))

    lines = (tmp_path / "model.user.txt").read_text().splitlines()
    assert [json.loads(line) for line in lines] == model.vocabularies["user"].names
    left = {each.name for each in tmp_path.iterdir()} - {"requests.pickle", "answers.pickle"}
    assert left == {"saved", "model.onnx", "model.user.txt", "model.ids.txt", "own", "own.onnx"}
    with pytest.raises(FileExistsError, match=r"which exists. Remove it, or choose another"):
        own.export(tmp_path / "own")


@pytest.mark.slow
def test_a_tower_that_tensorflow_cannot_run_is_named(tmp_path):
    model = TwoTowerModel(OnJax(), keras.layers.Embedding(NUM_ITEMS, 16), "user", "item")
    model.recommend({"user": [1, 2]})
    with pytest.raises(ValueError, match=r"must run on Keras's TensorFlow backend.*`query_tower` 'on_jax', a `OnJax`"):
        model.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_is_an_error_and_writes_nothing(tmp_path, monkeypatch):
    model = TwoTowerModel(keras.layers.Embedding(30, 16), keras.layers.Embedding(NUM_ITEMS, 16), "user", "item")
    target = tmp_path / "folder" / "model"
    with pytest.raises(ValueError, match=r"has not seen 'user'. Call it on a batch first"):
        model.export(target)
    model.recommend({"user": [1, 2]})
    with pytest.raises(ValueError, match=r"`format` must be one of.*Received: format='tflite'"):
        model.export(target, "tflite")
    with pytest.raises(ValueError, match=r"An ONNX file ends in `.onnx`"):
        model.export(target, "onnx")
    for k, message in ((0, r"`k` must be a positive int"), (54, r"`k` must not exceed the number of candidates")):
        with pytest.raises(ValueError, match=message):
            model.export(target, k=k)
    with pytest.raises(ValueError, match=r"`input_signature` must name query features.*\['age'\]"):
        model.export(target, input_signature={"age": keras.InputSpec(shape=(None,), dtype="int32")})
    monkeypatch.setattr(OnJax, "__module__", "__main__")
    of_script = TwoTowerModel(OnJax(), keras.layers.Embedding(NUM_ITEMS, 16), "user", "item")
    of_script.recommend({"user": [1, 2]})
    with pytest.raises(ValueError, match=r"classes of a module that can be imported.*\['OnJax'\].*Move them"):
        of_script.export(target)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else find_spec(name))
    with pytest.raises(ImportError, match=r'without tf2onnx. Install them: `pip install "keras_rs_contrib\[export\]"`'):
        model.export(tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ids", "exclude_ids", "SCORES", "1st", "_"])
def test_a_feature_that_an_export_cannot_name_is_an_error(tmp_path, name):
    model = TwoTowerModel(keras.layers.Embedding(30, 16), keras.layers.Embedding(NUM_ITEMS, 16), name, "item")
    model.recommend({name: [1, 2]})
    with pytest.raises(ValueError, match=rf"needs a name of its own.*Received: the query feature '{name}'"):
        model.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["a", "\ud800"], [1, 2**63]])
def test_names_that_a_format_cannot_hold_are_an_error(tmp_path, names):
    users = Vocabulary(names)
    tower = keras.layers.Embedding(len(users), 16)
    model = TwoTowerModel(tower, keras.layers.Embedding(NUM_ITEMS, 16), "user", "item", vocabularies={"user": users})
    model({"user": np.array([1, 2])})
    with pytest.raises(ValueError, match=r"must be Unicode, or integers of 64 bits. Received: "):
        model.export(tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())
