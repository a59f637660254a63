r"""Measures what large tables cost the hosts, outside of compiled programs: memory of NumPy arrays, saving and loading.

    python examples/benchmarks/host_costs.py

Each cost is that of one name, example, candidate or byte, to be multiplied by the numbers of a large model. Memory is
the peak of the resident memory of the process, on Linux.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags
from timing import Memory, Table, print_setting

from keras_rs_contrib import RowSparseEmbedding, TwoTowerModel, Vocabulary, load_model
from keras_rs_contrib.model.popularity import Popularity
from keras_rs_contrib.model.training_data import TrainingData

FLAGS = flags.FLAGS
flags.DEFINE_integer("names", 2_000_000, "Names of a vocabulary.", lower_bound=1)
flags.DEFINE_integer("candidates", 10_000_000, "Candidates that are ordered by popularity.", lower_bound=1)
flags.DEFINE_integer("examples", 10_000_000, "Examples of an epoch.", lower_bound=10_000)
flags.DEFINE_integer("rows", 1_000_000, "Rows of a saved table.", lower_bound=1000)
flags.DEFINE_integer("dimension", 128, "Dimension of a saved table.", lower_bound=1)

BATCH = 10_000
# Results stay, so that no measurement reuses the memory of an earlier one.
KEPT = []


def measured(function):
    """Returns the bytes by which the process grows at most while a function runs, and the seconds that it takes."""
    start = time.perf_counter()
    with Memory() as memory:
        KEPT.append(function())
        seconds = time.perf_counter() - start
    return memory.grown, seconds


def vocabulary():
    """Yields the memory of a vocabulary."""
    grown, seconds = measured(lambda: Vocabulary([f"item {i:010d}" for i in range(FLAGS.names)]))
    yield "a `Vocabulary` of names of 15 letters", FLAGS.names, "name", grown, seconds


def popularity():
    """Yields the cost of ordering candidates by popularity, as after `fit` with validation data."""
    ids = np.unique(np.random.default_rng(0).integers(0, FLAGS.candidates, FLAGS.candidates // 10))
    counts = np.ones(len(ids), "int64")
    grown, seconds = measured(lambda: Popularity.of_candidates(np.arange(FLAGS.candidates), [], ids, counts))
    yield "popularity after `fit`", FLAGS.candidates, "candidate", grown, seconds


def training_data():
    """Yields what `fit` keeps of the examples of two epochs, and what it needs at its end."""
    rng, data, present = np.random.default_rng(0), TrainingData(), np.ones(BATCH, bool)
    num_batches = FLAGS.examples // BATCH

    def two_epochs():
        data.begin(seen=False)
        for number in [*range(num_batches)] * 2:
            queries, candidates = rng.integers(0, 10**9, (2, BATCH)).astype("int32")
            data.add(number, queries, candidates, present, present, ~present)

    grown, seconds = measured(two_epochs)
    yield "`fit`, from the second epoch on", num_batches * BATCH, "example", grown, seconds
    grown, seconds = measured(data.end)
    yield "the end of `fit`, in addition", num_batches * BATCH, "example", grown, seconds


def files():
    """Yields the costs of saving and loading a table with an optimizer slot."""
    towers = [RowSparseEmbedding(rows, FLAGS.dimension) for rows in (1000, FLAGS.rows)]
    model = TwoTowerModel(*towers, "query", "candidate")
    model.compile("adagrad")
    model.fit({"query": np.arange(1000), "candidate": np.arange(1000)}, verbose=0)
    num_bytes = 2 * 4 * FLAGS.rows * FLAGS.dimension
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.keras"
        grown, seconds = measured(lambda: model.save(path))
        yield "`save`", num_bytes, "byte of the weights", grown, seconds
        grown, seconds = measured(lambda: load_model(path))
        yield "`load_model`, weights included", num_bytes, "byte of the weights", grown, seconds


def main(_):
    """Prints the table."""
    print_setting()
    print()
    table = Table()
    for cost in (vocabulary, training_data, popularity, files):
        for name, number, unit, grown, seconds in cost():
            table.print(
                {
                    "": f"{name:<38}",
                    "memory, bytes": f"{grown / number:.1f}",
                    "for each": f"{unit:>19}",
                    "number per second": f"{number / seconds:,.0f}",
                }
            )


if __name__ == "__main__":
    app.run(main)
