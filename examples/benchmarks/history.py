r"""Compares towers of user ids with towers of histories, on the last film of each user of MovieLens 100K.

    TFDS_DATA_DIR=... python examples/benchmarks/history.py
    TFDS_DATA_DIR=... python examples/benchmarks/history.py --new_users
    TFDS_DATA_DIR=... python examples/benchmarks/history.py --tune

Every rating is a positive, even a low one. The last film of each user is held out, and the films before it are for
training. Of films that a user rated in the same second, the last is that of the last row. The list of a user holds all
films that the user has not rated in training. The methods:

- Popularity: the number of ratings in training.
- User ids: an embedding of the user.
- Mean, GRU, attention: a `HistoryTower` on the films before the next one, without and with the user's own row.

All towers share the film tower, the in-batch softmax with log-q correction, and the settings in `SETTINGS`, which were
chosen without the last films: `--tune` leaves them out, and holds out the film before them. `--new_users` leaves
out a fifth of the users in training, and recommends to them by history alone.

Attention follows W.-C. Kang and J. McAuley, "Self-attentive sequential recommendation" (SASRec), ICDM 2018. Their
Hit@10 of 0.8245 and NDCG@10 of 0.5905 on MovieLens 1M rank the last film among 100 random films that the user has not
rated. They are not comparable with the figures here, where it is ranked among all films.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses
import functools
import pathlib
import sys
import time

import keras
import keras_rs
import numpy as np
from absl import app, flags
from timing import Table, print_setting

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import movielens

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    HistoryTower,
    NDCGAtK,
    RecallAtK,
    StreamingSamplingProbability,
    TwoTowerModel,
    group_candidate_ids,
    shard_candidates,
)

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_seeds", 3, "Number of seeds for each method that draws random numbers.", lower_bound=1)
flags.DEFINE_bool("tune", False, "Compare settings on the film before the last, without the last.")
flags.DEFINE_bool("new_users", False, "Recommend to users that are not in training.")
flags.DEFINE_list("only", [], "Names of methods to run, such as 'GRU + row'. All by default.")
flags.DEFINE_enum("dataset", "movielens", ["movielens", "synthetic"], "As in the example.")

# Users are numbered from 1: row 0 stands for those that are not in training.
NEW_USER = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters of a model.

    Attributes:
        encoder: as in `HistoryTower`, or `None` for an embedding of user ids.
        has_row: whether a history tower adds the user's own row.
    """

    encoder: str | None = None
    has_row: bool = False
    query_dropout: float = 0.0
    dropout: float = 0.0
    max_length: int = 10
    num_blocks: int | None = None
    embedding_dim: int = 64
    temperature: float = 0.15
    learning_rate: float = 0.002
    batch_size: int = 512
    epochs: int = 10
    sampling_correction: bool = True


SETTINGS = {
    "user ids": Settings(),
    "mean": Settings("mean"),
    "mean + row": Settings("mean", has_row=True),
    "GRU": Settings("gru", epochs=5),
    "GRU + row": Settings("gru", has_row=True, epochs=5),
    "attention": Settings("attention", dropout=0.2, epochs=6),
    "attention + row": Settings("attention", has_row=True, dropout=0.2, epochs=6),
}
# Changes that `--tune` makes to the settings of a method, one at a time.
CHANGES = {
    "mean + row": (
        {},
        {"max_length": 5},
        {"max_length": 20},
        {"max_length": 50},
        {"embedding_dim": 128},
        {"temperature": 0.1},
        {"temperature": 0.2},
        {"learning_rate": 0.001},
        {"learning_rate": 0.004},
        {"batch_size": 256},
        {"batch_size": 1024},
        {"epochs": 20},
        {"dropout": 0.2},
        {"query_dropout": 0.2},
        {"sampling_correction": False},
    ),
    "GRU + row": ({}, {"max_length": 20}, {"epochs": 3}, {"dropout": 0.2}),
    "attention + row": ({}, {"max_length": 20}, {"dropout": 0.0}, {"num_blocks": 2}),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Films in the order of time, with the films before them.

    Attributes:
        train: `user_id`, `movie_id` and `history` of each film for training that is not the first of its user.
        queries: `user_id` and `history` of each user to recommend to.
        held_out: `[num_queries, 1]` int32, their next film.
        seen: `[num_queries, m]` int32, their films in training, padded with -1.
        counts: `[num_movies + 1]` ints, the number of ratings of each film in training.
    """

    train: dict[str, np.ndarray]
    queries: dict[str, np.ndarray]
    held_out: np.ndarray
    seen: np.ndarray
    counts: np.ndarray


@functools.cache
def data_of(max_length):
    """Returns the data, with up to `max_length` films before each film."""
    ratings = movielens.load(FLAGS.dataset)
    order = np.lexsort((ratings.timestamps, ratings.user_ids))
    users, movies = ratings.user_ids[order], ratings.movie_ids[order]
    rows, first = np.arange(len(users)), np.searchsorted(users, users)
    num_after = np.searchsorted(users, users, side="right") - 1 - rows
    earlier = rows[:, None] + np.arange(-max_length, 0)
    history = np.where(earlier >= first[:, None], movies[np.maximum(earlier, 0)], -1)
    is_held_out, is_train = num_after == FLAGS.tune, num_after > FLAGS.tune
    seen = group_candidate_ids(users[is_train], movies[is_train], users[is_held_out])
    queries = {"user_id": users, "history": history}
    if FLAGS.new_users:
        is_new = np.random.default_rng(0).random(users.max() + 1)[users] < 0.2
        seen = seen[is_new[is_held_out]]
        is_held_out, is_train = is_held_out & is_new, is_train & ~is_new
        queries["user_id"] = np.full_like(users, NEW_USER)
    return Data(
        train={
            "user_id": users[is_train & (rows > first)],
            "movie_id": movies[is_train & (rows > first)],
            "history": history[is_train & (rows > first)],
        },
        queries={name: values[is_held_out] for name, values in queries.items()},
        held_out=movies[is_held_out, None],
        seen=seen,
        counts=np.bincount(movies[is_train], minlength=ratings.num_movies + 1),
    )


def make_model(settings, data):
    """Returns the compiled model."""
    num_rows = len(data.counts)
    movies = keras.layers.Embedding(num_rows, settings.embedding_dim)
    users = keras.layers.Embedding(movielens.NUM_USERS + 1, settings.embedding_dim)
    tower, features = users, "user_id"
    if settings.encoder is not None:
        features = ["user_id", "history"] if settings.has_row else "history"
        tower = HistoryTower(
            movies,
            "history",
            encoder=settings.encoder,
            query_table=users if settings.has_row else None,
            query_feature="user_id" if settings.has_row else None,
            query_dropout=settings.query_dropout,
            mask_zero=True,
            max_length=settings.max_length,
            num_blocks=settings.num_blocks,
            dropout=settings.dropout,
        )
    probability = StreamingSamplingProbability(num_rows, counts=data.counts) if settings.sampling_correction else None
    model = TwoTowerModel(
        tower,
        movies,
        query_features=features,
        candidate_features="movie_id",
        task=DistributedTwoTowerTask(
            similarity="cosine", temperature=settings.temperature, remove_accidental_hits=True
        ),
        retrieval=shard_candidates(
            keras_rs.layers.BruteForceRetrieval(k=10), movies, exclude_ids=[0], similarity="cosine"
        ),
        sampling_probability=probability,
        corpus_metrics=[RecallAtK(10), NDCGAtK(10)],
    )
    steps = settings.epochs * -(-len(data.train["movie_id"]) // settings.batch_size)
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps)))
    return model


def train_and_evaluate(settings, seed):
    """Returns the metrics of a trained model."""
    keras.utils.set_random_seed(seed)
    data = data_of(settings.max_length)
    model = make_model(settings, data)
    model.fit(data.train, batch_size=settings.batch_size, epochs=settings.epochs, verbose=0)
    return model.evaluate_queries(data.queries, data.held_out, data.seen)


def popularity():
    """Returns the metrics of popularity."""
    data = data_of(1)
    rows, columns = np.nonzero(data.seen >= 0)
    is_seen = np.zeros((len(data.seen), len(data.counts)), bool)
    is_seen[rows, data.seen[rows, columns]] = True
    count = data.counts[data.held_out]
    ids = np.arange(len(data.counts))
    # Equal counts rank by lower id, as in the package.
    is_better = (data.counts > count) | ((data.counts == count) & (ids < data.held_out))
    ranks = (is_better & ~is_seen & (ids > 0)).sum(axis=1).astype("int32")
    result = {}
    for metric in (RecallAtK(10), NDCGAtK(10)):
        metric.update_state(ranks)
        result[metric.name] = float(metric.result())
    return result


def print_row(table, name, run, seeds):
    """Runs a method with each seed, and prints the mean of each metric, with the minimum and maximum."""
    results, seconds = [], []
    for seed in seeds:
        start = time.perf_counter()
        results.append(run(seed))
        seconds.append(time.perf_counter() - start)
    row = {"": f"{name:<40}"}
    for metric, title in (("recall_at_10", "Recall@10"), ("ndcg_at_10", "NDCG@10")):
        values = [result[metric] for result in results]
        row[title] = f"{np.mean(values):.4f} ({min(values):.3f}-{max(values):.3f})"
    table.print({**row, "seconds a run": f"{np.median(seconds):.1f}", "runs": str(len(seeds))})


def main(argv):
    """Prints the setting and the table."""
    methods = [name for name in SETTINGS if not FLAGS.new_users or SETTINGS[name].encoder is not None]
    if unknown := set(FLAGS.only) - set(methods):
        sys.exit(f"--only must name methods among {methods}. Received: {sorted(unknown)}.")
    movielens.load_or_exit(argv, FLAGS.dataset)
    print_setting()
    part = "film before the last" if FLAGS.tune else "last film"
    users = "a fifth of the users, who are not in training" if FLAGS.new_users else "all users"
    print(f"Dataset: {FLAGS.dataset}; held out: the {part} of {users}. In parentheses: minimum and maximum.\n")
    table, seeds = Table(), range(FLAGS.num_seeds)
    print_row(table, "popularity", lambda seed: popularity(), [0])
    for method in methods:
        if FLAGS.only and method not in FLAGS.only:
            continue
        changes = ({},)
        if FLAGS.new_users and SETTINGS[method].has_row:
            changes = ({}, {"query_dropout": 0.2}, {"query_dropout": 0.5})
        elif FLAGS.tune:
            changes = CHANGES.get(method, changes)
        for change in changes:
            settings = dataclasses.replace(SETTINGS[method], **change)
            name = ", ".join([method, *(f"{field}={value}" for field, value in change.items())])
            print_row(table, name, lambda seed, settings=settings: train_and_evaluate(settings, seed), seeds)


if __name__ == "__main__":
    app.run(main)
