r"""Damages `.keras` files, and counts what `load_model` makes of them.

    python examples/benchmarks/fuzz.py --num_files=2000

Each file is that of a small compiled `TwoTowerModel`, with checksums, or as it would be without them. With checksums, a
file must load with equal answers, or raise the documented error. Without them, changed values may load as well, with
other answers. A file that takes more than a minute counts as "other". `memory` is how much the process grows at most.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import pathlib
import random
import sys
import tempfile
from collections import Counter

import keras
import numpy as np
from absl import app, flags, logging
from mutations import KINDS, outcome, without_checksums
from timing import Memory, Table, print_setting

from keras_rs_contrib import RowAdagrad, RowSparseEmbedding, TwoTowerModel, Vocabulary, load_model

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_files", 2000, "Number of damaged files.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of the damages.")


def save_model(path):
    """Saves a small compiled model that has been trained."""
    keras.utils.set_random_seed(0)
    users, films = Vocabulary([f"user {number}" for number in range(20)]), Vocabulary(range(100, 130))
    model = TwoTowerModel(
        RowSparseEmbedding(len(users), 4, optimizer=RowAdagrad(0.1)),
        keras.layers.Embedding(len(films), 4),
        query_features="user",
        candidate_features="film",
        vocabularies={"user": users, "film": films},
    )
    model.compile("adam")
    rows = np.random.default_rng(0).permutation(60)
    model.fit({"user": [users.names[row % 20] for row in rows], "film": 100 + rows % 30}, seen="training", verbose=0)
    model.save(path)


def answers(model):
    """Returns names and scores of films for some users, one of them unknown."""
    return model.recommend(["user 0", "user 7", "nobody"], k=3)


def damage(folder, file, kind, numbers, progress):
    """Loads damaged copies of a file, and returns the row of a table."""
    path, counts = folder / "damaged.keras", Counter()
    expected = answers(load_model(folder / "saved.keras"))
    with Memory() as memory:
        for number in numbers:
            path.write_bytes(KINDS[kind](file, random.Random(f"{FLAGS.seed} {number}")))
            result, text = outcome(path, load_model, answers, expected)
            counts[result] += 1
            if result == "other":
                print(f"\n{kind}, file {number}: {text[:500]}", file=sys.stderr)
            keras.utils.clear_session(free_memory=False)
            progress.add(1)
    return counts, memory.grown


def main(argv):
    """Prints the setting, and a table by kind of damage."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    logging.set_verbosity(logging.ERROR)
    print_setting("h5py")
    progress, rows = keras.utils.Progbar(FLAGS.num_files, unit_name="file"), []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_model(folder / "saved.keras")
        saved = (folder / "saved.keras").read_bytes()
        kinds = [(kind, with_checksums) for with_checksums in (True, False) for kind in KINDS]
        for place, (kind, with_checksums) in enumerate(kinds):
            file = saved if with_checksums else without_checksums(saved)
            numbers = range(place, FLAGS.num_files, len(kinds))
            counts, grown = damage(folder, file, kind, numbers, progress)
            rows.append((kind, with_checksums, counts, grown))
    print()
    table = Table()
    for kind, with_checksums, counts, grown in rows:
        table.print(
            {
                "damaged": f"{kind:<22}",
                "checksums": "yes" if with_checksums else "no",
                "files": f"{counts.total():>5}",
                "equal answers": str(counts["equal"]),
                "clear error": str(counts["clear"]),
                "other answers": str(counts["different"]),
                "other": str(counts["other"]),
                "memory, MiB": f"{grown / 2**20:.0f}",
            }
        )


if __name__ == "__main__":
    app.run(main)
