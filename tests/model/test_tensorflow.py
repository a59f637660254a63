"""Models that were trained on JAX, on one device or many, and answer requests on TensorFlow."""

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

from keras_rs_contrib import (
    HistoryTower,
    RowSparseEmbedding,
    ShardedEmbedding,
    TwoTowerModel,
    Vocabulary,
    shard_candidates,
)

pytestmark = pytest.mark.slow

NUM_USERS, NUM_ITEMS = 30, 53
RNG = np.random.default_rng(0)
USERS, ITEMS = RNG.integers(0, NUM_USERS, 90), RNG.integers(0, NUM_ITEMS, 90)
FEATURES = RNG.standard_normal((NUM_ITEMS, 3)).astype("float32")
HISTORIES = RNG.integers(0, NUM_ITEMS, (90, 4))


def rows_of_names():
    users = Vocabulary([f"u{i}" for i in range(NUM_USERS)])
    items = Vocabulary([f"i{i}" for i in range(NUM_ITEMS)])
    model = TwoTowerModel(
        RowSparseEmbedding(len(users), 16),
        RowSparseEmbedding(len(items), 16, optimizer="lazy_adam"),
        query_features="user",
        candidate_features="item",
        vocabularies={"user": users, "item": items},
    )
    data = {"user": [f"u{i}" for i in USERS], "item": [f"i{i}" for i in ITEMS]}
    return model, data, {"user": ["u1", "nobody", "u2", "u5"]}, [["i1"], ["i2", "i3"], ["i4"], ["i5"]]


def split_tables():
    model = TwoTowerModel(
        ShardedEmbedding(NUM_USERS, 16),
        ShardedEmbedding(NUM_ITEMS, 16, mesh_axis="batch"),
        query_features="user",
        candidate_features="item",
        exclude_feature="seen",
    )
    queries = {"user": np.arange(4), "seen": np.array([[1, 2], [3, -1], [-1, -1], [9, 9]])}
    return model, {"user": USERS, "item": ITEMS}, queries, [[5], [6, 7], [8], [0]]


def features():
    tower = keras.Sequential([keras.layers.Dense(16, "relu"), keras.layers.Dense(16)])
    index = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=10),
        tower,
        candidates=FEATURES,
        candidate_ids=np.arange(NUM_ITEMS)[::-1] * 3,
        exclude_ids=[0],
        similarity="biased_cosine",
    )
    model = TwoTowerModel(
        keras.layers.Embedding(NUM_USERS, 16), tower, "user", "features", candidate_id="item", retrieval=index
    )
    rows = ITEMS[ITEMS > 0]
    data = {"user": USERS[ITEMS > 0], "features": FEATURES[-1 - rows], "item": rows * 3}
    return model, data, {"user": np.arange(4)}, [[3], [6, 9], [12], [3]]


def histories():
    tower = HistoryTower(keras.layers.Embedding(NUM_ITEMS, 16), "history")
    model = TwoTowerModel(tower, keras.layers.Embedding(NUM_ITEMS, 16), "history", "item")
    return model, {"history": HISTORIES, "item": ITEMS}, {"history": HISTORIES[:4]}, [[1], [2, 3], [4], [5]]


MODELS = [rows_of_names, split_tables, features, histories]

SCRIPT = """
    import pickle, sys
    import keras, numpy as np
    import keras_rs_contrib

    with open(sys.argv[1], "rb") as file:
        requests = pickle.load(file)
    answers = {}
    for path, (data, queries, positives) in requests.items():
        model = keras.saving.load_model(path)
        named = bool(model.vocabularies)
        answers[path] = {
            "recommend": tuple(model.recommend(queries, k=7)),
            "limited": tuple(model.recommend(queries, k=7, include_ids=[each for row in positives for each in row])),
            "predict": model.predict(queries, verbose=0),
            "call": None if named else [np.asarray(each) for each in model(queries)],
            "evaluate": model.evaluate(data, batch_size=40, verbose=0, return_dict=True),
            "evaluate_queries": model.evaluate_queries(queries, positives),
            "score": model.score(data),
        }
        for bad in ({}, {name: values[:0] for name, values in queries.items()}):
            try:
                model.predict(bad, verbose=0)
            except ValueError:
                continue
            raise AssertionError(bad)
    with open(sys.argv[2], "wb") as file:
        pickle.dump(answers, file)
"""


def on_tensorflow(requests, folder):
    """The answers of saved models, loaded in a process on TensorFlow."""
    with open(folder / "requests.pickle", "wb") as file:
        pickle.dump(requests, file)
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), folder / "requests.pickle", folder / "answers.pickle"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with open(folder / "answers.pickle", "rb") as file:
        return pickle.load(file)


@pytest.mark.filterwarnings("ignore:`seen`:UserWarning")
def test_a_saved_model_answers_alike_on_tensorflow(tmp_path):
    requests, expected = {}, {}
    for num_devices in (1, 8):
        for make in MODELS:
            keras.distribution.set_distribution(None if num_devices == 1 else data_parallel(num_devices))
            model, data, queries, positives = make()
            model.compile("adam")
            model.fit(data, batch_size=45, verbose=0)
            path = str(tmp_path / f"{make.__name__}{num_devices}.keras")
            model.save(path)
            requests[path] = (data, queries, positives)
            include = [each for row in positives for each in row]
            expected[path] = {
                "recommend": tuple(model.recommend(queries, k=7)),
                "limited": tuple(model.recommend(queries, k=7, include_ids=include)),
                "predict": model.predict(queries, verbose=0),
                "call": None if model.vocabularies else [np.asarray(each) for each in model(queries)],
                "evaluate": model.evaluate(data, batch_size=40, verbose=0, return_dict=True),
                "evaluate_queries": model.evaluate_queries(queries, positives),
                "score": model.score(data),
            }
    answers = on_tensorflow(requests, tmp_path)
    for path, results in expected.items():
        for name, result in results.items():
            for found, value in zip(keras.tree.flatten(answers[path][name]), keras.tree.flatten(result), strict=True):
                if np.asarray(value).dtype.kind == "f":
                    np.testing.assert_allclose(found, value, atol=1e-5, err_msg=f"{path} {name}")
                else:
                    np.testing.assert_array_equal(found, value, err_msg=f"{path} {name}")
