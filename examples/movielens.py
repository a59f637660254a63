"""MovieLens 100K for the example: prepared by TensorFlow Datasets, or a synthetic stand-in of the same shape.

MovieLens: F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

import dataclasses
import os
import pathlib
import re
import threading
import urllib.request

import numpy as np

MOVIELENS_HOST = "https://files.grouplens.org/"
PROBE_SECONDS = 5.0
DATASETS = ("100k-ratings", "100k-movies")

NUM_USERS, NUM_MOVIES, NUM_RATINGS = 943, 1682, 100_000
NUM_TASTES = 8


class MovieLensUnavailableError(Exception):
    """MovieLens is neither on this machine nor to be had."""


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Ratings of movies by users.

    Attributes:
        source: `"movielens"` or `"synthetic"`.
        user_ids: `[num_ratings]` int32, from 1.
        movie_ids: `[num_ratings]` int32, from 1.
        ratings: `[num_ratings]` float32, 1 to 5 stars scaled to 0..1.
        titles: the title of each movie id; id 0 is no movie.
        user_tastes: the planted taste of each user id in the stand-in, `None` for MovieLens.
        movie_tastes: likewise of each movie id.
    """

    source: str
    user_ids: np.ndarray
    movie_ids: np.ndarray
    ratings: np.ndarray
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
        """Returns the ratings in `rows`, of the same users and movies."""
        return dataclasses.replace(
            self, user_ids=self.user_ids[rows], movie_ids=self.movie_ids[rows], ratings=self.ratings[rows]
        )


def load(dataset: str, data_dir: str | None = None, seed: int = 0) -> Ratings:
    """Returns ratings.

    Args:
        dataset: `"movielens"`, `"synthetic"`, or `"auto"` for the first of the two that can be had.
        data_dir: where TFDS keeps its datasets; `None` for its own place.
        seed: of the stand-in.

    Raises:
        MovieLensUnavailableError: if `dataset` is `"movielens"`, it is not prepared, and cannot be downloaded.
    """
    if dataset == "synthetic":
        return synthetic(seed)
    try:
        return movielens(data_dir)
    except MovieLensUnavailableError as error:
        if dataset == "movielens":
            raise
        print(f"{error}\nGoing on with the synthetic stand-in.", flush=True)
        return synthetic(seed)


def movielens(data_dir: str | None = None) -> Ratings:
    """Returns MovieLens 100K from `data_dir`, downloaded and prepared there first if it is not."""
    place = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    prepared = [_prepared_version(place / "movielens" / name) for name in DATASETS]
    if None in prepared and not _host_answers():
        raise MovieLensUnavailableError(
            f"MovieLens 100K is not prepared in {place}, and {MOVIELENS_HOST} does not answer. "
            "Prepare it there with TensorFlow Datasets, or name its place by --data_dir."
        )

    if None in prepared:
        print(f"Downloading MovieLens 100K to {place}.", flush=True)
    # Whatever goes wrong in there, a dropped connection or a damaged file: there is no MovieLens then.
    try:
        return _read(place, prepared)
    except Exception as error:
        raise MovieLensUnavailableError(f"MovieLens 100K could not be read from {place}: {error}") from error


def _read(place: pathlib.Path, prepared: list[pathlib.Path | None]) -> Ratings:
    """Returns MovieLens 100K from the prepared directories of its ratings and movies, made in `place` if `None`."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    if None in prepared:
        builders = [tfds.builder(f"movielens/{name}", data_dir=place) for name in DATASETS]
        for builder in builders:
            builder.download_and_prepare()
    else:
        builders = [tfds.builder_from_directory(directory) for directory in prepared]

    # All records at once and only these features: decoding example by example takes ten times as long.
    def read(builder: tfds.core.DatasetBuilder, **dtypes: tf.DType) -> dict[str, np.ndarray]:
        records = tf.data.TFRecordDataset([str(path) for path in builder.info.splits["train"].filepaths])
        features = {name: tf.io.FixedLenFeature([], dtype) for name, dtype in dtypes.items()}
        (serialized,) = records.batch(builder.info.splits["train"].num_examples)
        return {name: values.numpy() for name, values in tf.io.parse_example(serialized, features).items()}

    ratings = read(builders[0], user_id=tf.string, movie_id=tf.string, user_rating=tf.float32)
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
        titles=titles,
    )


def synthetic(seed: int = 0) -> Ratings:
    """Returns made-up ratings of MovieLens's shape: few movies popular, most not, each user and movie of one taste.

    Users rate movies of their own taste more often and higher, so that a recommendation can be right or wrong.
    """
    generator = np.random.default_rng(seed)
    user_tastes = generator.integers(NUM_TASTES, size=NUM_USERS + 1)
    movie_tastes = generator.integers(NUM_TASTES, size=NUM_MOVIES + 1)

    # How many movies each user rates: at least 20, and far more for some.
    activity = generator.lognormal(sigma=1.0, size=NUM_USERS)
    counts = np.minimum(20 + activity / activity.sum() * (NUM_RATINGS - 20 * NUM_USERS), NUM_MOVIES // 2).astype(int)
    while (missing := NUM_RATINGS - counts.sum()) > 0:
        counts[generator.choice(np.flatnonzero(counts < NUM_MOVIES // 2), size=min(missing, 100), replace=False)] += 1

    # Which ones: a draw without replacement (Gumbel top-k) by long-tailed popularity, more likely of one's own taste.
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
        titles=["", *(f"Film {i} (taste {movie_tastes[i]})" for i in range(1, NUM_MOVIES + 1))],
        user_tastes=user_tastes,
        movie_tastes=movie_tastes,
    )


def split(ratings: Ratings, seed: int, train_share: float = 0.8) -> tuple[Ratings, Ratings]:
    """Returns a random share of the ratings for training and the rest for validation."""
    order = np.random.default_rng(seed).permutation(len(ratings.ratings))
    num_train = round(len(order) * train_share)
    return ratings.select(order[:num_train]), ratings.select(order[num_train:])


def import_tensorflow_quietly() -> None:
    """Imports TensorFlow, which greets on stderr from C++ before any setting of its own can stop it."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        # Only MovieLens needs it; Keras imports it where it is there.
        pass
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _prepared_version(directory: pathlib.Path) -> pathlib.Path | None:
    """Returns the latest prepared version in a dataset's directory, without asking TFDS, which asks the network."""
    versions = [path.parent for path in directory.glob("*/dataset_info.json")]
    versions = [path for path in versions if re.fullmatch(r"\d+(\.\d+)*", path.name)]
    return max(versions, key=lambda path: [int(part) for part in path.name.split(".")], default=None)


def _host_answers() -> bool:
    """Returns whether the host of MovieLens answers within `PROBE_SECONDS`, name resolution included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(MOVIELENS_HOST, method="HEAD")
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answered.set()
        except OSError:
            pass

    # Name resolution has no time-out of its own; a thread that hangs in it ends with the program.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
