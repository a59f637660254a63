"""MovieLens 100K for the example, prepared by TensorFlow Datasets, or synthetic data of the same shape.

MovieLens: F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

import dataclasses
import os
import pathlib
import re
import sys
import threading
import urllib.request

import numpy as np
from absl import logging

MOVIELENS_HOST = "https://files.grouplens.org/"
PROBE_SECONDS = 5.0
DATASETS = ("100k-ratings", "100k-movies")

NUM_USERS, NUM_MOVIES, NUM_RATINGS = 943, 1682, 100_000
NUM_TASTES = 8
# The times of synthetic ratings: seven months from September 1997 on, as in MovieLens.
FIRST_TIMESTAMP, SECONDS = 874_724_710, 18_562_000


class MovieLensUnavailableError(Exception):
    """MovieLens is not on this machine and cannot be downloaded."""


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Ratings of movies by users.

    Attributes:
        source: `"movielens"` or `"synthetic"`.
        user_ids: `[num_ratings]` int32, from 1.
        movie_ids: `[num_ratings]` int32, from 1.
        ratings: `[num_ratings]` float32, 1 to 5 stars scaled to 0..1.
        timestamps: `[num_ratings]` int64, the time of each rating in seconds since 1970.
        titles: the title of each movie id. Id 0 is unused.
        user_tastes: `[num_users + 1]` ints, the planted taste of each user id in synthetic data, or `None`.
        movie_tastes: `[num_movies + 1]` ints, the planted taste of each movie id in synthetic data, or `None`.
    """

    source: str
    user_ids: np.ndarray
    movie_ids: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    titles: list[str]
    user_tastes: np.ndarray | None = None
    movie_tastes: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        """The largest user id."""
        return int(self.user_ids.max())

    @property
    def num_movies(self) -> int:
        """The largest movie id."""
        return len(self.titles) - 1

    def select(self, rows: np.ndarray) -> "Ratings":
        """Returns the ratings in `rows`."""
        columns = ("user_ids", "movie_ids", "ratings", "timestamps")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in columns})


def load(dataset: str, data_dir: str | None = None, seed: int = 0) -> Ratings:
    """Returns ratings.

    Args:
        dataset: `"movielens"`, `"synthetic"`, or `"auto"` for MovieLens if available and synthetic data otherwise.
        data_dir: the directory in which TFDS keeps its datasets, or `None` for its default.
        seed: seed of the synthetic data.

    Raises:
        MovieLensUnavailableError: if `dataset` is `"movielens"`, and it cannot be read or downloaded.
    """
    if dataset == "synthetic":
        return synthetic(seed)
    try:
        return movielens(data_dir)
    except MovieLensUnavailableError as error:
        if dataset == "movielens":
            raise
        print(f"{error}\nContinuing with synthetic data.", flush=True)
        return synthetic(seed)


def load_or_exit(argv: list[str], dataset: str) -> Ratings:
    """Returns ratings for a program whose only arguments are flags. Exits with one line if something is wrong.

    Args:
        argv: the arguments of the program that are not flags.
        dataset: as in `load`.
    """
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    logging.set_verbosity(logging.WARNING)
    import_tensorflow_quietly()
    try:
        return load(dataset)
    except MovieLensUnavailableError as error:
        sys.exit(str(error))


def movielens(data_dir: str | None = None) -> Ratings:
    """Returns MovieLens 100K from `data_dir`. Downloads and prepares it there if necessary."""
    place = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    prepared = [_prepared_version(place / "movielens" / name) for name in DATASETS]
    if None in prepared and not _host_answers():
        raise MovieLensUnavailableError(
            f"MovieLens 100K is not prepared in {place}, and {MOVIELENS_HOST} does not answer. "
            "Prepare it there with TensorFlow Datasets, or set --data_dir to its directory."
        )

    if None in prepared:
        print(f"Downloading MovieLens 100K to {place}.", flush=True)
    # TFDS raises many kinds of errors, for instance for a dropped connection or a damaged file.
    try:
        return _read(place, prepared)
    except Exception as error:
        raise MovieLensUnavailableError(f"MovieLens 100K could not be read from {place}: {error}") from error


def _read(place: pathlib.Path, prepared: list[pathlib.Path | None]) -> Ratings:
    """Returns MovieLens 100K from the `prepared` directories. Prepares it in `place` if any of them is `None`."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    if None in prepared:
        builders = [tfds.builder(f"movielens/{name}", data_dir=place) for name in DATASETS]
        for builder in builders:
            builder.download_and_prepare()
    else:
        builders = [tfds.builder_from_directory(directory) for directory in prepared]

    # Parse all records at once, and only these features: decoding one example at a time takes ten times as long.
    def read(builder: tfds.core.DatasetBuilder, **dtypes: tf.DType) -> dict[str, np.ndarray]:
        records = tf.data.TFRecordDataset([str(path) for path in builder.info.splits["train"].filepaths])
        features = {name: tf.io.FixedLenFeature([], dtype) for name, dtype in dtypes.items()}
        (serialized,) = records.batch(builder.info.splits["train"].num_examples)
        return {name: values.numpy() for name, values in tf.io.parse_example(serialized, features).items()}

    ratings = read(builders[0], user_id=tf.string, movie_id=tf.string, user_rating=tf.float32, timestamp=tf.int64)
    movies = read(builders[1], movie_id=tf.string, movie_title=tf.string)
    movie_ids = movies["movie_id"].astype(np.int32)
    titles = [""] * (movie_ids.max() + 1)
    for movie_id, title in zip(movie_ids, movies["movie_title"], strict=True):
        titles[movie_id] = title.decode("utf-8", errors="replace")
    return Ratings(
        source="movielens",
        user_ids=ratings["user_id"].astype(np.int32),
        movie_ids=ratings["movie_id"].astype(np.int32),
        ratings=(ratings["user_rating"] - 1.0) / 4.0,
        timestamps=ratings["timestamp"],
        titles=titles,
    )


def synthetic(seed: int = 0) -> Ratings:
    """Returns synthetic ratings of the shape of MovieLens: popularity has a long tail, and ratings depend on tastes.

    Each user and each movie has one taste. Users rate movies of their own taste more often and higher, so that a
    recommendation can be right or wrong.
    """
    generator = np.random.default_rng(seed)
    user_tastes = generator.integers(NUM_TASTES, size=NUM_USERS + 1)
    movie_tastes = generator.integers(NUM_TASTES, size=NUM_MOVIES + 1)

    # The number of movies that each user rates: at least 20, and far more for some users.
    activity = generator.lognormal(sigma=1.0, size=NUM_USERS)
    counts = np.minimum(20 + activity / activity.sum() * (NUM_RATINGS - 20 * NUM_USERS), NUM_MOVIES // 2).astype(int)
    while (missing := NUM_RATINGS - counts.sum()) > 0:
        counts[generator.choice(np.flatnonzero(counts < NUM_MOVIES // 2), size=min(missing, 100), replace=False)] += 1

    # The rated movies are drawn without replacement (Gumbel top-k), by popularity and by match with the user's taste.
    popularity = -2.0 * np.log(100 + generator.permutation(NUM_MOVIES))
    match = user_tastes[1:, None] == movie_tastes[None, 1:]
    preference = popularity + 2.5 * match + generator.gumbel(size=match.shape)
    order = np.argsort(-preference, axis=1)
    users, ranks = np.nonzero(np.arange(NUM_MOVIES) < counts[:, None])
    movies = order[users, ranks]

    stars = np.where(match[users, movies], 4.6, 2.4) + generator.normal(scale=0.8, size=NUM_RATINGS)
    return Ratings(
        source="synthetic",
        user_ids=(users + 1).astype(np.int32),
        movie_ids=(movies + 1).astype(np.int32),
        ratings=((np.clip(np.rint(stars), 1, 5) - 1.0) / 4.0).astype(np.float32),
        timestamps=FIRST_TIMESTAMP + generator.integers(SECONDS, size=NUM_RATINGS),
        titles=["", *(f"Film {i} (taste {movie_tastes[i]})" for i in range(1, NUM_MOVIES + 1))],
        user_tastes=user_tastes,
        movie_tastes=movie_tastes,
    )


def split(ratings: Ratings, seed: int, train_share: float = 0.8) -> tuple[Ratings, Ratings]:
    """Returns a random share of the ratings for training, and the rest for validation."""
    order = np.random.default_rng(seed).permutation(len(ratings.ratings))
    num_train = round(len(order) * train_share)
    return ratings.select(order[:num_train]), ratings.select(order[num_train:])


def import_tensorflow_quietly() -> None:
    """Imports TensorFlow without the messages that its C++ code writes to stderr before any setting can stop them."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        # Only MovieLens needs TensorFlow. Keras imports it if it is installed.
        pass
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _prepared_version(directory: pathlib.Path) -> pathlib.Path | None:
    """Returns the latest prepared version in a dataset's directory. Avoids TFDS, which would access the network."""
    versions = [path.parent for path in directory.glob("*/dataset_info.json")]
    versions = [path for path in versions if re.fullmatch(r"\d+(\.\d+)*", path.name)]
    return max(versions, key=lambda path: [int(part) for part in path.name.split(".")], default=None)


def _host_answers() -> bool:
    """Returns whether the host of MovieLens answers within `PROBE_SECONDS`, including name resolution."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(MOVIELENS_HOST, method="HEAD")
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answered.set()
        except OSError:
            pass

    # Name resolution has no timeout. A daemon thread that hangs in it ends with the program.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
