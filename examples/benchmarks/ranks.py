r"""Times the rank of one candidate per query in the whole corpus: this package, and TFRS's `FactorizedTopK`.

    python examples/benchmarks/ranks.py --quick
    python examples/benchmarks/ranks.py --tfrs_python=/path/to/another/venv/bin/python

TFRS needs another Keras, and therefore its own environment. Create one with
`pip install tensorflow-recommenders tf_keras`, and pass its interpreter as `--tfrs_python`. The reference is the matrix
product of queries and table, in blocks, with a maximum over its rows, so that the product is not stored.

All functions are timed in turns. Each ratio is the median of the ratios of single turns, with quartiles in parentheses.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools

import jax
import keras
import keras_rs
import numpy as np
from absl import app, flags, logging
from jax import numpy as jnp
from timing import Table, in_turns, milliseconds, print_setting, ratio, tfrs_peer, timed

from keras_rs_contrib import shard_candidates

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Time only one small size.")
flags.DEFINE_list("num_candidates", ["10000", "100000"], "Numbers of candidates, which are the rows of the table.")
flags.DEFINE_integer("num_queries", 4000, "Number of queries, each with one candidate.", lower_bound=1)
flags.DEFINE_list("dimension", ["32", "64"], "Dimensions of the embeddings.")
flags.DEFINE_integer(
    "num_excluded", 100, "Number of excluded candidates per query, for one of the columns.", lower_bound=1
)
flags.DEFINE_integer("turns", 9, "Maximum number of turns: each turn times each function once.", lower_bound=3)
flags.DEFINE_float("seconds", 30.0, "Time limit for each size in seconds, after at least three turns.")
flags.DEFINE_string("tfrs_python", None, "Python interpreter of an environment with TFRS. Without it, TFRS is skipped.")

QUERIES_AT_ONCE = 50


def benchmark(peer, num_candidates, dimension, num_queries):
    """Returns one row of the results."""
    table = np.random.default_rng(0).normal(size=(num_candidates, dimension)).astype("float32")
    queries = jax.device_put(np.random.default_rng(1).normal(size=(num_queries, dimension)).astype("float32"))
    targets = jax.device_put(np.random.default_rng(2).integers(0, num_candidates, num_queries).astype("int32"))
    excluded = np.random.default_rng(3).integers(0, num_candidates, (num_queries, FLAGS.num_excluded))
    excluded = jax.device_put(excluded.astype("int32"))
    tower = keras.layers.Embedding(num_candidates, dimension, weights=table)
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=10), tower)

    @jax.jit
    def product(queries, table):
        blocks = queries.reshape(-1, QUERIES_AT_ONCE, dimension)
        return jax.lax.map(lambda block: jnp.max(table @ block.T, axis=0), blocks)

    on_device = jax.device_put(table)
    functions = {
        "product": timed(lambda: product(queries, on_device)),
        "ours": timed(lambda: index.ranks(queries, targets)),
        "ours, excluding": timed(lambda: index.ranks(queries, targets, exclude_ids=excluded)),
    }
    if peer is not None:
        sizes = {"num_candidates": num_candidates, "num_queries": num_queries, "dimension": dimension, "k": 100}
        functions["TFRS"] = functools.partial(peer.time, task="FactorizedTopK", **sizes)
    times = in_turns(functions, FLAGS.turns, FLAGS.seconds)
    row = {
        "candidates": f"{num_candidates:,}",
        "d": str(dimension),
        "queries": f"{num_queries:,}",
        "product and maximum, ms": milliseconds(times["product"]),
        "ours, ms": milliseconds(times["ours"]),
        "ours / product": ratio(times["ours"], times["product"]),
        f"excluding {FLAGS.num_excluded}, ms": milliseconds(times["ours, excluding"]),
    }
    if peer is not None:
        row["FactorizedTopK, ms"] = milliseconds(times["TFRS"])
        row["FactorizedTopK / ours"] = ratio(times["TFRS"], times["ours"])
    return row


def main(_):
    """Times each size and prints the table."""
    logging.set_verbosity(logging.WARNING)
    num_queries = FLAGS.num_queries - FLAGS.num_queries % -QUERIES_AT_ONCE
    sizes = [(int(n), int(d)) for n in FLAGS.num_candidates for d in FLAGS.dimension]
    if FLAGS.quick:
        sizes, num_queries = [(10_000, 32)], 1_000
    print_setting()
    peer = tfrs_peer(FLAGS.tfrs_python)
    table = Table()
    for num_candidates, dimension in sizes:
        table.print(benchmark(peer, num_candidates, dimension, num_queries))
    if peer is not None:
        peer.close()


if __name__ == "__main__":
    app.run(main)
