"""Times training with and without checkpoints.

    python examples/benchmarks/checkpoints.py --quick
    python examples/benchmarks/checkpoints.py --directory=/path/on/the/disk/to/write/to

The model has two towers of one embedding each, row-sparse or dense, with Adagrad, and runs in `fit`, in turns without
and with `TrainingCheckpoint(every_steps=100)`. The time of a step is that of all steps divided by their number. It
contains what training waits for, such as copies of the tables, and what writing in the background takes from it. The
end of `fit`, which waits for the last checkpoint, is contained only in the processor time, which is that of the whole
process.
A checkpoint that is due while the last one is being written waits for it, so that there may be fewer than one every 100
steps.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import itertools
import pathlib
import re
import shutil
import statistics
import tempfile
import time

import keras
import numpy as np
from absl import app, flags, logging
from timing import Table, in_turns, milliseconds, print_setting, ratio

from keras_rs_contrib import RowSparseEmbedding, TrainingCheckpoint, TwoTowerModel

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Time only small tables.")
flags.DEFINE_list("towers", ["row_sparse"], "Towers to time: row_sparse, dense (`keras.layers.Embedding`).")
flags.register_validator(
    "towers",
    lambda towers: set(towers) <= {"row_sparse", "dense"},
    message="--towers takes row_sparse and dense, separated by commas.",
)
flags.DEFINE_list("rows", ["100000", "1000000"], "Numbers of rows to time, for each of the two tables.")
flags.DEFINE_list("batch_sizes", ["1000", "4096"], "Batch sizes to time.")
flags.DEFINE_integer("dimension", 32, "Embedding dimension.", lower_bound=1)
flags.DEFINE_integer("every_steps", 100, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("steps", 500, "Steps of a timed call of `fit`.", lower_bound=1)
flags.DEFINE_integer("turns", 5, "Maximum number of turns: each turn times each function once.", lower_bound=3)
flags.DEFINE_float("seconds", 120.0, "Time limit for each size in seconds, after at least three turns.")
flags.DEFINE_string("directory", None, "Folder to write checkpoints in. By default, one for temporary files.")


class TimeSteps(keras.callbacks.Callback):
    """Measures the time from the first step to the end of the last one."""

    def on_epoch_begin(self, epoch, logs=None):
        """Begins."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Ends: Keras has waited for the metrics of the last step."""
        self.seconds = time.perf_counter() - self.start


class Training:
    """A function for `in_turns` that trains a model.

    Args:
        model: a compiled model.
        x: features.
        batch_size: number of rows in a batch.
        directory: the folder of checkpoints, or `None` for none.
    """

    def __init__(self, model, x, batch_size, directory=None):
        self.model, self.x, self.batch_size, self.directory = model, x, batch_size, directory
        self.counts, self.processor_times = [], []

    def __call__(self):
        """Trains on all batches, and returns the time per step in seconds."""
        timing, callbacks = TimeSteps(), []
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            callbacks = [TrainingCheckpoint(self.directory, every_steps=FLAGS.every_steps, keep=99)]
        start = time.process_time()
        # Before the checkpoint at the end of the epoch.
        self.model.fit(self.x, batch_size=self.batch_size, shuffle=False, verbose=0, callbacks=[timing, *callbacks])
        self.processor_times.append((time.process_time() - start) / FLAGS.steps)
        if self.directory is not None:
            names = [path.name for path in self.directory.iterdir()]
            self.counts.append(sum(bool(re.fullmatch(r"epoch-0-batch-\d+", name)) for name in names))
        return timing.seconds / FLAGS.steps

    def megabytes(self):
        """Returns the size of the last checkpoint."""
        files = (self.directory / "epoch-1-batch-0").rglob("*")
        return sum(path.stat().st_size for path in files if path.is_file()) / 1e6


def embedding(tower, num_rows):
    """Returns a tower of a table."""
    if tower == "dense":
        return keras.layers.Embedding(num_rows, FLAGS.dimension)
    return RowSparseEmbedding(num_rows, FLAGS.dimension, optimizer=keras.optimizers.Adagrad(0.1))


def main(_):
    """Times each size, and prints a table."""
    logging.set_verbosity(logging.ERROR)
    print_setting("orbax-checkpoint")
    row_counts = [10_000] if FLAGS.quick else [int(n) for n in FLAGS.rows]
    batch_sizes = [1000] if FLAGS.quick else [int(n) for n in FLAGS.batch_sizes]
    print(f"\nA checkpoint is due every {FLAGS.every_steps} of {FLAGS.steps} steps, {FLAGS.dimension} dimensions:\n")
    table = Table()
    with tempfile.TemporaryDirectory(dir=FLAGS.directory) as directory:
        for tower, num_rows, batch_size in itertools.product(FLAGS.towers, row_counts, batch_sizes):
            rng = np.random.default_rng(0)
            x = {name: rng.integers(0, num_rows, FLAGS.steps * batch_size, "int32") for name in ("user", "movie")}
            model = TwoTowerModel(
                embedding(tower, num_rows), embedding(tower, num_rows), "user", "movie", corpus_metrics=[]
            )
            model.compile(keras.optimizers.Adagrad(0.1))
            functions = {
                "without": Training(model, x, batch_size),
                "with": Training(model, x, batch_size, pathlib.Path(directory) / "checkpoints"),
            }
            times = in_turns(functions, FLAGS.turns, FLAGS.seconds)
            table.print(
                {
                    "towers": tower,
                    "rows": f"{num_rows:,}",
                    "batch": f"{batch_size:,}",
                    "MB": f"{functions['with'].megabytes():.0f}",
                    "step without, ms": milliseconds(times["without"]),
                    "step with, ms": milliseconds(times["with"]),
                    "with / without": ratio(times["with"], times["without"]),
                    "processor, with / without": ratio(
                        *(functions[name].processor_times for name in ("with", "without"))
                    ),
                    "checkpoints": f"{statistics.median(functions['with'].counts):.0f}",
                }
            )


if __name__ == "__main__":
    app.run(main)
