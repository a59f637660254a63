r"""Times a `Vocabulary`: encoding and decoding columns of names, next to `pandas.factorize`, and files.

    pip install pandas
    python examples/benchmarks/vocabulary.py

`pandas.factorize` numbers the same column, with no table that outlives the call. All run in turns. Each ratio is the
median of the ratios of single turns, with quartiles in parentheses.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import pathlib
import sys
import tempfile
import time

import keras
import numpy as np
import pandas as pd
from absl import app, flags, logging
from timing import Table, in_turns, milliseconds, print_setting, ratio, timed

from keras_rs_contrib import TwoTowerModel, Vocabulary

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_rows", 1_000_000, "Number of rows of a column.", lower_bound=1)
flags.DEFINE_list("num_names", ["2000", "100000", "1000000"], "Numbers of different names.")
flags.DEFINE_integer("turns", 7, "Maximum number of turns: each turn times each function once.", lower_bound=3)
flags.DEFINE_float("seconds", 20.0, "Time limit for each column in seconds, after at least three turns.")


def columns(num_names):
    """Returns columns of `num_names` names, by their kind."""
    numbers = np.random.default_rng(0).permutation(np.arange(FLAGS.num_rows) % num_names)
    strings = [f"user-{number:08d}" for number in numbers]
    return {
        "Series of str": pd.Series(strings, dtype="str"),
        "array of objects": np.array(strings, object),
        "NumPy strings": np.array(strings),
        "int64": 10**6 + 7 * numbers,
    }


def time_columns():
    """Prints a row for each column."""
    table = Table()
    for num_names in map(int, FLAGS.num_names):
        for kind, column in columns(num_names).items():
            vocabulary = Vocabulary.from_data(column)
            rows = vocabulary.encode(column)
            times = in_turns(
                {
                    "factorize": timed(lambda column=column: pd.factorize(column)[0]),
                    "encode": timed(lambda column=column, vocabulary=vocabulary: vocabulary.encode(column)),
                    "decode": timed(lambda rows=rows, vocabulary=vocabulary: len(vocabulary.decode(rows))),
                },
                FLAGS.turns,
                FLAGS.seconds,
            )
            table.print(
                {
                    "rows": f"{FLAGS.num_rows:>9,}",
                    "names": f"{num_names:>9,}",
                    "column": f"{kind:<16}",
                    "factorize, ms": milliseconds(times["factorize"]),
                    "encode, ms": milliseconds(times["encode"]),
                    "encode / factorize": ratio(times["encode"], times["factorize"]),
                    "decode / factorize": ratio(times["decode"], times["factorize"]),
                }
            )


def time_files():
    """Prints the times and sizes of a saved model with a vocabulary."""
    names = [f"user-{number:08d}" for number in np.random.default_rng(0).permutation(FLAGS.num_rows)]
    users = Vocabulary(names)
    model = TwoTowerModel(
        keras.layers.Embedding(len(users), 1),
        keras.layers.Embedding(10, 1),
        "user_id",
        "movie_id",
        vocabularies={"user_id": users},
    )
    model({"user_id": np.array([1]), "movie_id": np.array([1])})
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model.keras"
        start = time.perf_counter()
        model.save(path)
        saved = time.perf_counter()
        keras.saving.load_model(path)
        loaded = time.perf_counter()
        size = path.stat().st_size - 4 * len(users)
    characters = sum(map(len, names))
    print(
        f"\nA model with {len(names):,} names: saved in {saved - start:.1f} s, loaded in {loaded - saved:.1f} s. "
        f"Beside its table, the file has {size / 2**20:.1f} MiB, for names of {characters / 2**20:.1f} MiB."
    )


def main(argv):
    """Prints the setting, the table, and what a file costs."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    logging.set_verbosity(logging.WARNING)
    print_setting("pandas", "numpy")
    time_columns()
    time_files()


if __name__ == "__main__":
    app.run(main)
