"""Compares the lists and the latency of exported models with those of `recommend`.

A SavedModel runs in TensorFlow alone, and an ONNX file in ONNX Runtime, each in a process of its own. The candidates
have duplicates, whose scores are equal.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
from absl import app, flags, logging
from timing import print_setting

BATCHES = (1, 7, 64, 1000)
NUM_CANDIDATES = flags.DEFINE_integer("num_candidates", 20_000, "The number of candidates.", lower_bound=100)
DIMENSION = flags.DEFINE_integer("dimension", 32, "The size of an embedding.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 50, "How often each batch is timed.", lower_bound=1)

# In a process without Keras, JAX and this package.
CLIENT = """
import sys, time
import numpy as np

# An import of one of them fails.
sys.modules.update(dict.fromkeys(("keras", "jax", "keras_rs_contrib")))
kind, path, queries, result, repeats = sys.argv[1:6]
queries = dict(np.load(queries))
if kind == "tf_saved_model":
    import tensorflow as tf

    signature = tf.saved_model.load(path).signatures["serving_default"]

    def answer(users):
        found = signature(user=tf.constant(users))
        return found["ids"].numpy(), found["scores"].numpy()
else:
    import onnxruntime

    # The input `exclude_ids` has a value, and so is optional, of which the runtime warns.
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(path)

    def answer(users):
        return session.run(["ids", "scores"], {"user": users})

found = {}
for name, users in queries.items():
    found[f"ids {name}"], found[f"scores {name}"] = answer(users)
    times = []
    for _ in range(int(repeats)):
        start = time.perf_counter()
        answer(users)
        times.append(time.perf_counter() - start)
    found[f"time {name}"] = np.median(times)
np.savez(result, **found)
"""


def main(_: list[str]) -> None:
    """Exports a model, asks it, and prints the table."""
    logging.set_verbosity(logging.WARNING)
    import keras

    import keras_rs_contrib

    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    num_users = 5000
    table = generator.standard_normal((NUM_CANDIDATES.value, DIMENSION.value)).astype("float32")
    copies = generator.integers(0, NUM_CANDIDATES.value, (2, NUM_CANDIDATES.value // 4))
    table[copies[0]] = table[copies[1]]
    model = keras_rs_contrib.TwoTowerModel(
        keras.layers.Embedding(num_users, DIMENSION.value, embeddings_initializer="normal"),
        keras.layers.Embedding(NUM_CANDIDATES.value, DIMENSION.value, weights=[table]),
        query_features="user",
        candidate_features="item",
    )
    model({"user": np.zeros(1, "int32")})
    queries = {str(size): generator.integers(0, num_users, size).astype("int32") for size in BATCHES}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        np.savez(folder / "queries.npz", **queries)
        clients = {}
        for kind, path in (("tf_saved_model", folder / "saved_model"), ("onnx", folder / "model.onnx")):
            model.export(path, kind, verbose=False)
            result = folder / f"{kind}.npz"
            program = [sys.executable, "-c", CLIENT, kind, path, folder / "queries.npz", result, str(REPEATS.value)]
            subprocess.run(program, check=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
            clients[kind] = dict(np.load(result))
        print_setting("tensorflow", "onnxruntime")
        print(f"{NUM_CANDIDATES.value:,} candidates of {DIMENSION.value}, k=10; milliseconds, median")
        print("| queries | recommend | TensorFlow | ratio | ONNX Runtime | ratio | same lists | same lists, ONNX |")
        print("|--:|--:|--:|--:|--:|--:|--:|--:|")
        for size, users in queries.items():
            expected = model.recommend({"user": users})
            times = []
            for _ in range(REPEATS.value):
                start = time.perf_counter()
                model.recommend({"user": users})
                times.append(time.perf_counter() - start)
            own = np.median(times)
            cells = []
            for kind in clients:
                each = clients[kind][f"time {size}"]
                cells += [1e3 * each, each / own]
            same = [np.mean((clients[kind][f"ids {size}"] == expected.ids).all(axis=1)) for kind in clients]
            row = " | ".join(f"{cell:.2f}" for cell in (1e3 * own, *cells))
            print(f"| {size} | {row} | {same[0]:.2%} | {same[1]:.2%} |")


if __name__ == "__main__":
    app.run(main)
