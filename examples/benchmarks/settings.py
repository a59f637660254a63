r"""Shows which settings of `TwoTowerModel` matter for the quality of recommendations, and by how much.

    TFDS_DATA_DIR=... python examples/benchmarks/settings.py

MovieLens 100K, every rating a positive, a random fifth held out. The first row is a model with the defaults of the
package, `compile("adam")`, 64 dimensions and ten epochs in batches of 256. Each other row changes one setting. The list
of a user holds all films that the user has not rated in training, and each user counts once.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pathlib
import sys

import keras
import keras_rs
import numpy as np
from absl import app, flags
from timing import Table, print_setting

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import movielens

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    StreamingSamplingProbability,
    TwoTowerModel,
    group_candidate_ids,
    shard_candidates,
)

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_splits", 3, "Number of random splits into training and held-out ratings.", lower_bound=1)
flags.DEFINE_integer("epochs", 10, "Number of epochs of the first row.", lower_bound=1)
flags.DEFINE_enum("dataset", "movielens", ["movielens", "synthetic"], "As in the example.")

DEFAULTS = {
    "epochs": None,
    "batch_size": 256,
    "embedding_dim": 64,
    "optimizer": "adam",
    "learning_rate": 0.001,
    "similarity": "cosine",
    "temperature": 0.2,
    "correction": True,
    "remove_accidental_hits": True,
}
CHANGES = {
    "defaults of the package": {},
    "no sampling correction": {"correction": False},
    "with accidental hits": {"remove_accidental_hits": False},
    "dot product, temperature 1": {"similarity": "dot", "temperature": None},
    "temperature 0.1": {"temperature": 0.1},
    "temperature 0.4": {"temperature": 0.4},
    "16 dimensions": {"embedding_dim": 16},
    "128 dimensions": {"embedding_dim": 128},
    "batches of 32": {"batch_size": 32},
    "batches of 1024": {"batch_size": 1024},
    "learning rate 0.003": {"learning_rate": 0.003},
    "learning rate 0.0003": {"learning_rate": 0.0003},
    "3 epochs": {"epochs": 3},
    "30 epochs": {"epochs": 30},
    "Adagrad(0.2), as in the tutorial": {"optimizer": "adagrad", "learning_rate": 0.2},
    "TFRS's defaults: dot product, none of the above": {
        "similarity": "dot",
        "temperature": None,
        "correction": False,
        "remove_accidental_hits": False,
    },
}


def make_model(settings):
    """Returns a compiled model. Without changes, it is what the package creates by itself."""
    num_movies = movielens.NUM_MOVIES + 1
    user_tower = keras.layers.Embedding(movielens.NUM_USERS + 1, settings["embedding_dim"])
    movie_tower = keras.layers.Embedding(num_movies, settings["embedding_dim"])
    arguments = {}
    names = ("similarity", "temperature", "correction", "remove_accidental_hits")
    if any(settings[name] != DEFAULTS[name] for name in names):
        arguments = {
            "task": DistributedTwoTowerTask(
                similarity=settings["similarity"],
                temperature=settings["temperature"],
                remove_accidental_hits=settings["remove_accidental_hits"],
            ),
            "sampling_probability": StreamingSamplingProbability(num_movies) if settings["correction"] else None,
        }
    # Row 0 is unused: movie ids start at 1.
    retrieval = shard_candidates(
        keras_rs.layers.BruteForceRetrieval(k=10), movie_tower, exclude_ids=[0], similarity=settings["similarity"]
    )
    model = TwoTowerModel(user_tower, movie_tower, "user_id", "movie_id", retrieval=retrieval, **arguments)
    optimizer = {"adam": keras.optimizers.Adam, "adagrad": keras.optimizers.Adagrad}[settings["optimizer"]]
    model.compile(optimizer(settings["learning_rate"]))
    return model


def run(split_seed, changes):
    """Returns the metrics of the users' lists, of a model and of popularity."""
    settings = {**DEFAULTS, "epochs": FLAGS.epochs, **changes}
    train, held_out = movielens.split(movielens.load(FLAGS.dataset), split_seed)
    keras.utils.set_random_seed(split_seed)
    model = make_model(settings)
    data = {"user_id": train.user_ids, "movie_id": train.movie_ids}
    model.fit(data, batch_size=settings["batch_size"], epochs=settings["epochs"], seen="training", verbose=0)
    users = np.arange(1, movielens.NUM_USERS + 1)
    films = group_candidate_ids(held_out.user_ids, held_out.movie_ids, users)
    return [model.evaluate_queries(users, films, by_popularity=popular, verbose=0) for popular in (False, True)]


def main(argv):
    """Prints the setting and the table."""
    movielens.load_or_exit(argv, FLAGS.dataset)
    print_setting("numpy")
    print(f"Dataset: {FLAGS.dataset}, {FLAGS.num_splits} splits; held out: a fifth of all ratings.\n")
    table, default = Table(), None

    def print_row(name, results):
        nonlocal default
        ndcg = [result["ndcg_at_10"] for result in results]
        default = np.mean(ndcg) if default is None else default
        table.print(
            {
                "": f"{name:<48}",
                "NDCG@10": f"{np.mean(ndcg):.4f} ({min(ndcg):.3f}-{max(ndcg):.3f})",
                "difference": f"{np.mean(ndcg) - default:+.4f}",
                "Recall@10": f"{np.mean([result['recall_at_10'] for result in results]):.4f}",
            }
        )

    for name, changes in CHANGES.items():
        ours, popularity = zip(*(run(seed, changes) for seed in range(FLAGS.num_splits)), strict=True)
        print_row(name, ours)
        if not changes:
            print_row("popularity", popularity)


if __name__ == "__main__":
    app.run(main)
