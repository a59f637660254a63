r"""Times exact top-k retrieval: this package, the plain matrix product, Keras RS, Faiss and TFRS.

    python examples/benchmarks/top_k.py --quick
    python examples/benchmarks/top_k.py --tfrs_python=/path/to/another/venv/bin/python

Faiss is included if it is installed (`pip install faiss-cpu`). TFRS needs another Keras, and therefore its own
environment. Create one with `pip install tensorflow-recommenders tf_keras`, and pass its interpreter as
`--tfrs_python`.

All indexes hold the same table and answer the same queries, compiled, in turns. Each ratio is the median of the ratios
of single turns, with quartiles in parentheses. The last table shows the memory of one search for many queries: the
growth of a separate process during the search.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools
import json
import statistics
import subprocess
import sys

import jax
import keras
import keras_rs
import numpy as np
from absl import app, flags, logging
from keras import ops
from timing import Memory, Table, in_turns, milliseconds, print_setting, ratio, tfrs_peer, timed

from keras_rs_contrib import shard_candidates

try:
    import faiss
except ImportError:
    faiss = None

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Time only four small sizes, in about a minute.")
flags.DEFINE_list(
    "num_candidates",
    ["10000", "100000", "999983", "1000000"],
    "Numbers of candidates, which are the rows of the table.",
)
flags.DEFINE_list("num_queries", ["1", "64", "512"], "Numbers of queries per batch.")
flags.DEFINE_list("dimension", ["32", "64", "128"], "Dimensions of the embeddings.")
flags.DEFINE_list("k", ["10", "100"], "Numbers of candidates to return.")
flags.DEFINE_integer("turns", 15, "Maximum number of turns: each turn times each function once.", lower_bound=3)
flags.DEFINE_float("seconds", 6.0, "Time limit for each size in seconds, after at least three turns.")
flags.DEFINE_float("recall_target", 0.95, "`recall_target` of the approximate search.")
flags.DEFINE_string("tfrs_python", None, "Python interpreter of an environment with TFRS. Without it, TFRS is skipped.")
flags.DEFINE_bool("peers", True, "Whether to also time Faiss and TFRS.")
flags.DEFINE_integer("memory_of", None, "Only print the memory of a search with this block size; 0 for the default.")

MEMORY_QUERIES, MEMORY_CANDIDATES, MEMORY_DIMENSION = 4096, 1_000_000, 64


def compiled(layer):
    """Returns a function that calls a Keras layer as `predict` compiles it."""
    call = jax.jit(lambda *arguments: layer.stateless_call(*arguments)[0])

    def run(queries):
        # In a tied index the table is a trainable variable, in the layer of Keras RS it is not.
        trainable = [v.value for v in layer.trainable_variables]
        return call(trainable, [v.value for v in layer.non_trainable_variables], queries)

    return run


def our_index(table, k, **arguments):
    """Returns an index that is tied to an embedding."""
    tower = keras.layers.Embedding(*table.shape, weights=table)
    return shard_candidates(keras_rs.layers.BruteForceRetrieval(k=k), tower, **arguments)


def benchmark(table, faiss_index, peer, num_queries, k):
    """Returns one row of the results."""
    num_candidates, dimension = table.shape
    queries = np.random.default_rng(1).normal(size=(num_queries, dimension)).astype("float32")
    on_device = jax.device_put(queries), jax.device_put(table)
    product = jax.jit(lambda queries, table: ops.matmul(queries, ops.transpose(table)))
    index, keras_rs_index = our_index(table, k), keras_rs.layers.BruteForceRetrieval(k=k)
    index(on_device[0])
    keras_rs_index.update_candidates(table)
    search, keras_rs_search = compiled(index), compiled(keras_rs_index)
    functions = {
        "product": timed(lambda: product(*on_device)),
        "ours": timed(lambda: search(on_device[0])),
        "Keras RS": timed(lambda: keras_rs_search(on_device[0])),
    }
    if faiss_index is not None:
        functions["Faiss"] = timed(lambda: faiss_index.search(queries, k))
    if peer is not None:
        for task in ("BruteForce", "Streaming"):
            sizes = {"num_candidates": num_candidates, "num_queries": num_queries, "dimension": dimension, "k": k}
            functions[f"TFRS {task}"] = functools.partial(peer.time, task=task, **sizes)
    times = in_turns(functions, FLAGS.turns, FLAGS.seconds)
    _, exact = index(on_device[0])
    _, found = our_index(table, k, recall_target=FLAGS.recall_target)(on_device[0])
    recall = statistics.mean(np.isin(a, b).mean() for a, b in zip(np.asarray(exact), np.asarray(found), strict=True))
    row = {
        "candidates": f"{num_candidates:,}",
        "d": str(dimension),
        "queries": str(num_queries),
        "k": str(k),
        "product, ms": milliseconds(times["product"]),
        "ours, ms": milliseconds(times["ours"]),
        "ours / product": ratio(times["ours"], times["product"]),
    }
    for name in functions:
        if name not in ("product", "ours"):
            row[f"{name} / ours"] = ratio(times[name], times["ours"])
    return {**row, f"recall, target {FLAGS.recall_target}": f"{recall:.3f}"}


def print_memory(block_size):
    """Searches for many queries at once, and prints the growth of the process in bytes, as JSON."""
    table = np.random.default_rng(0).normal(size=(MEMORY_CANDIDATES, MEMORY_DIMENSION)).astype("float32")
    queries = np.random.default_rng(1).normal(size=(MEMORY_QUERIES, MEMORY_DIMENSION)).astype("float32")
    index = our_index(table, k=100, block_size=block_size or None)
    on_device = jax.device_put(queries)
    index(on_device[:1])
    search = compiled(index)
    with Memory() as memory:
        seconds = timed(lambda: search(on_device))()
    print(json.dumps({"seconds": seconds, "bytes": memory.grown}))


def main(_):
    """Times each size and prints the tables."""
    logging.set_verbosity(logging.WARNING)
    if FLAGS.memory_of is not None:
        print_memory(FLAGS.memory_of)
        return
    sizes = {name: [int(n) for n in FLAGS[name].value] for name in ("num_candidates", "num_queries", "dimension", "k")}
    if FLAGS.quick:
        sizes = {"num_candidates": [10_000, 99_991], "num_queries": [1, 64], "dimension": [64], "k": [10]}
    print_setting("faiss-cpu")
    if FLAGS.peers and faiss is None:
        print("Faiss is not installed: skipped.")
    peer = tfrs_peer(FLAGS.tfrs_python) if FLAGS.peers else None
    results = Table()
    for num_candidates in sizes["num_candidates"]:
        for dimension in sizes["dimension"]:
            table = np.random.default_rng(0).normal(size=(num_candidates, dimension)).astype("float32")
            faiss_index = None
            if FLAGS.peers and faiss is not None:
                faiss_index = faiss.IndexFlatIP(dimension)
                faiss_index.add(table)
            for num_queries in sizes["num_queries"]:
                for k in sizes["k"]:
                    results.print(benchmark(table, faiss_index, peer, num_queries, k))
    if peer is not None:
        peer.close()
    if FLAGS.quick:
        return
    print(f"\nMemory of {MEMORY_QUERIES:,} queries against {MEMORY_CANDIDATES:,} candidates, k=100, without the table")
    memory = Table()
    for block_size in (0, 2**24, 2**22):
        command = [sys.executable, __file__, f"--memory_of={block_size}"]
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        name = f"{block_size:,}" if block_size else "default"
        mebibytes = f"{answer['bytes'] / 2**20:.0f}"
        memory.print({"block_size": name, "memory, MiB": mebibytes, "first call, s": f"{answer['seconds']:.1f}"})


if __name__ == "__main__":
    app.run(main)
