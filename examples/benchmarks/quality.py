r"""Compares the quality of recommendations with that of simple methods, on the same splits of MovieLens 100K.

    pip install implicit
    TFDS_DATA_DIR=... python examples/benchmarks/quality.py
    TFDS_DATA_DIR=... python examples/benchmarks/quality.py --tune

Every rating is a positive, even a low one. A random fifth of the ratings is held out. The list of a user holds all
films that the user has not rated in training. Each user with held-out ratings counts once. The methods:

- Towers: `movielens_dp.py` with its defaults, run as a program, once for each split and seed.
- Popularity: the number of ratings in training.
- EASE: H. Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019, in closed form.
- ALS: Y. Hu et al., "Collaborative filtering for implicit feedback datasets", ICDM 2008, from the package `implicit`.

`--tune` evaluates hyperparameters on a tenth of the training ratings, without the held-out fifth. It prints one row for
each single change to the defaults of the towers, and for each point of the grids of EASE and ALS.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Recommended by `implicit`, which has its own threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags
from timing import Table, print_setting

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import movielens

from keras_rs_contrib import MeanReciprocalRank, NDCGAtK, RecallAtK, group_candidate_ids

PROGRAM = pathlib.Path(movielens.__file__).parent / "movielens_dp.py"

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_splits", 3, "Number of random splits into training and held-out ratings.", lower_bound=1)
flags.DEFINE_integer(
    "num_seeds", 3, "Number of seeds for each split, for methods that draw random numbers.", lower_bound=1
)
flags.DEFINE_bool("tune", False, "Evaluate hyperparameters on a tenth of the training ratings.")
flags.DEFINE_enum("dataset", "movielens", ["movielens", "synthetic"], "As in the example.")

METRICS = {"recall_at_10": "Recall@10", "ndcg_at_10": "NDCG@10", "mean_reciprocal_rank": "MRR"}
# Changes to the defaults of `--objective=retrieval`, evaluated one at a time.
CHANGES = (
    {},
    {"embedding_dim": 64},
    {"embedding_dim": 256},
    {"epochs": 5},
    {"epochs": 20},
    {"temperature": 0.15},
    {"temperature": 0.25},
    {"learning_rate": 0.0015},
    {"learning_rate": 0.006},
    {"schedule": "constant"},
    {"initial_scale": 0.05},
    {"initial_scale": 0.002},
    {"batch_size": 250},
    {"batch_size": 1000},
    {"similarity": "dot", "temperature": 1.0},
    {"sampling_correction": "none"},
    {"sampling_correction": "streaming"},
    {"noremove_accidental_hits": ""},
)
ALS_GRID = [
    (factors, regularization, alpha)
    for factors in (32, 64, 128)
    for regularization in (3, 10, 30, 100)
    for alpha in (1, 2, 4, 8)
]
EASE_GRID = (100, 200, 300, 400, 500, 600, 800)
ALS, EASE = (128, 30, 4), 500


def run_program(split_seed, seed, **changes):
    """Returns what the example writes to --metrics_json, and the duration of the whole program in seconds."""
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "metrics.json"
        arguments = {"dataset": FLAGS.dataset, "split_seed": split_seed, "seed": seed, "metrics_json": file, **changes}
        if FLAGS.tune:
            arguments["tune"] = ""
        command = [sys.executable, PROGRAM, *(f"--{n}={v}" if v != "" else f"--{n}" for n, v in arguments.items())]
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{' '.join(map(str, command))} ended with status {result.returncode}:\n{result.stderr}")
        return json.loads(file.read_text()), time.perf_counter() - start


def data_of(split_seed):
    """Returns the training and the held-out ratings of a split."""
    ratings = movielens.load(FLAGS.dataset)
    train, held_out = movielens.split(ratings, split_seed)
    return movielens.split(train, split_seed, train_share=0.9) if FLAGS.tune else (train, held_out)


def evaluate(scores, train, held_out):
    """Returns the metrics of scores of all users and films, as a dict by name.

    Args:
        scores: `[num_users + 1, num_movies + 1]` float; row and column 0 are unused.
        train: the ratings whose films are excluded from a user's list.
        held_out: the ratings whose films are positives.
    """
    scores = scores.astype("float64")
    scores[:, 0] = -np.inf
    scores[train.user_ids, train.movie_ids] = -np.inf
    # A stable sort ranks equal scores by lower row, as the package does.
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    users = np.arange(1, len(scores))
    films = group_candidate_ids(held_out.user_ids, held_out.movie_ids, users)
    ranks = np.where(films < 0, -1, np.take_along_axis(ranks[1:], np.maximum(films, 0), axis=1))
    result = {}
    for metric in (RecallAtK(10), NDCGAtK(10), MeanReciprocalRank()):
        metric.update_state(ranks.astype("int32"))
        result[metric.name] = float(metric.result())
    return result


def matrix_of(train):
    """Returns a `[num_users + 1, num_movies + 1]` float matrix: 1 if a user has rated a film, 0 otherwise."""
    matrix = np.zeros((movielens.NUM_USERS + 1, movielens.NUM_MOVIES + 1), "float64")
    matrix[train.user_ids, train.movie_ids] = 1.0
    return matrix


def popularity(train):
    """Returns the scores of popularity."""
    matrix = matrix_of(train)
    return np.broadcast_to(matrix.sum(axis=0), matrix.shape)


def ease(train, regularization):
    """Returns the scores of EASE."""
    matrix = matrix_of(train)
    inverse = np.linalg.inv(matrix.T @ matrix + regularization * np.eye(matrix.shape[1]))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return matrix @ weights


def als(train, seed, factors, regularization, alpha):
    """Returns the scores of ALS from `implicit`, or `None` if the package is not installed."""
    try:
        from implicit.als import AlternatingLeastSquares
        from scipy.sparse import csr_matrix
    except ImportError:
        return None
    model = AlternatingLeastSquares(factors, regularization=regularization, alpha=alpha, random_state=seed)
    model.fit(csr_matrix(matrix_of(train).astype("float32")), show_progress=False)
    return np.asarray(model.user_factors) @ np.asarray(model.item_factors).T


def print_row(table, name, results, seconds):
    """Prints the mean of each metric over runs, with the minimum and maximum of NDCG@10."""
    row = {"": f"{name:<44}"}
    for metric, title in METRICS.items():
        values = [result[metric] for result in results]
        spread = f" ({min(values):.3f}-{max(values):.3f})" if metric == "ndcg_at_10" else ""
        row[title] = f"{np.mean(values):.4f}{spread}"
    table.print({**row, "seconds a run": f"{np.median(seconds):.1f}", "runs": str(len(results))})


def print_method(table, name, scores_of, seeds_of):
    """Prints the row of a method.

    Args:
        table: the `Table` to print to.
        name: name of the method.
        scores_of: takes the training ratings and a seed, and returns scores, or `None` if the method is not installed.
        seeds_of: takes the seed of a split, and returns the seeds to run the method with.
    """
    results, seconds = [], []
    for split_seed in range(FLAGS.num_splits):
        train, held_out = data_of(split_seed)
        for seed in seeds_of(split_seed):
            start = time.perf_counter()
            scores = scores_of(train, seed)
            seconds.append(time.perf_counter() - start)
            if scores is None:
                print(f"{name}: skipped, because it is not installed.", file=sys.stderr)
                return
            results.append(evaluate(scores, train, held_out))
    print_row(table, name, results, seconds)


def compare(table):
    """Prints a row for each method."""
    splits, seeds = range(FLAGS.num_splits), range(FLAGS.num_seeds)

    def print_program(name, **changes):
        runs = [run_program(split_seed, seed, **changes) for split_seed in splits for seed in seeds]
        print_row(table, name, [content["user_metrics"] for content, _ in runs], [seconds for _, seconds in runs])

    print_method(table, "popularity", lambda train, seed: popularity(train), lambda split_seed: seeds[:1])
    print_program("towers, --objective=rating (the tutorial's)", objective="rating")
    print_method(
        table, f"ALS (implicit), {ALS[0]} factors", lambda train, seed: als(train, seed, *ALS), lambda split_seed: seeds
    )
    print_method(table, "EASE", lambda train, seed: ease(train, EASE), lambda split_seed: seeds[:1])
    print_program("towers, --objective=retrieval", objective="retrieval")


def tune(table):
    """Prints a row for each set of hyperparameters."""
    splits = range(FLAGS.num_splits)
    for changes in CHANGES:
        name = ", ".join(f"--{flag}={value}" if value != "" else f"--{flag}" for flag, value in changes.items())
        runs = [run_program(seed, seed, objective="retrieval", **changes) for seed in splits]
        results, seconds = [content["user_metrics"] for content, _ in runs], [seconds for _, seconds in runs]
        print_row(table, name or "towers, defaults of --objective=retrieval", results, seconds)
    candidates = [(f"EASE, regularization {r}", lambda train, seed, r=r: ease(train, r)) for r in EASE_GRID]
    for choice in ALS_GRID:
        name = "ALS, {} factors, regularization {}, alpha {}".format(*choice)
        candidates.append((name, lambda train, seed, choice=choice: als(train, seed, *choice)))
    for name, scores_of in candidates:
        print_method(table, name, scores_of, lambda split_seed: [split_seed])


def main(argv):
    """Prints the setting and the table."""
    movielens.load_or_exit(argv, FLAGS.dataset)
    print_setting("implicit", "numpy")
    part = "a tenth of the training ratings" if FLAGS.tune else "a fifth of all ratings"
    print(
        f"Dataset: {FLAGS.dataset}, {FLAGS.num_splits} splits; held out: {part}. In parentheses: minimum and maximum.\n"
    )
    (tune if FLAGS.tune else compare)(Table())


if __name__ == "__main__":
    app.run(main)
