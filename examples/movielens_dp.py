"""Retrieval with data parallel training: the keras.io tutorial of that name, as a program.

Trains two embedding towers on MovieLens 100K to predict ratings, on one device or many, and recommends films:

    python examples/movielens_dp.py --epochs=50
    python examples/movielens_dp.py --epochs=50 --num_devices=8 --users=42,7 --model_path=/tmp/movielens.keras

Tutorial: A. Sharma and F. Hertschuh, "Retrieval with data parallel training", keras.io, 2025.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import keras
import keras_rs
import movielens
import numpy as np
from absl import app, flags, logging

from keras_rs_contrib import DistributedTwoTowerTask, shard_candidates

VALIDATE_EVERY = 5
NUM_DEFAULT_USERS = 3
# More virtual devices than this take a machine down rather than show anything.
MAX_DEVICES = 256

FLAGS = flags.FLAGS
flags.DEFINE_integer("epochs", 50, "Passes over the training ratings.", lower_bound=1)
flags.DEFINE_integer("batch_size", 1000, "Ratings a training step, over all devices.", lower_bound=1)
flags.DEFINE_integer("embedding_dim", 32, "Dimension of the user and movie embeddings.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.2, "Learning rate of Adagrad.")
flags.register_validator(
    "learning_rate", lambda rate: rate > 0 and math.isfinite(rate), message="must be positive and finite"
)
flags.DEFINE_integer(
    "num_devices",
    None,
    "Devices to train on. By default all accelerators; without one, one virtual CPU device a core.",
    lower_bound=1,
    upper_bound=MAX_DEVICES,
)
flags.DEFINE_bool(
    "device_mesh", False, "Make `DataParallel` from a 1-D `DeviceMesh` instead of the list of devices: the same thing."
)
flags.DEFINE_integer(
    "seed",
    42,
    "Seed of the split, the initial embeddings and the stand-in data.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
flags.DEFINE_integer("k", 10, "Films to recommend to each user.", lower_bound=1)
flags.DEFINE_list("users", None, "Users to recommend to, such as 42,7. By default three drawn by the seed.")
flags.DEFINE_enum(
    "dataset",
    "auto",
    ["auto", "movielens", "synthetic"],
    "`movielens` from --data_dir, downloaded if it is not there; `synthetic`, a made-up stand-in of the same shape; "
    "`auto`, the first of the two that can be had.",
)
flags.DEFINE_string("data_dir", None, "Where TensorFlow Datasets keeps its data. By default its own place.")
flags.DEFINE_string("model_path", None, "A .keras file to save the model to, and to load it from again for a check.")
flags.DEFINE_string("metrics_json", None, "A file for flags, versions, history, seconds and recommendations, as JSON.")


@keras.saving.register_keras_serializable(package="movielens_dp")
class RetrievalModel(keras.Model):
    """The tutorial's two-tower rating model, with the task and the tied index in place of its own code."""

    def __init__(self, num_users: int, num_candidates: int, embedding_dim: int, k: int, **kwargs):
        super().__init__(**kwargs)
        self.arguments = {
            "num_users": num_users,
            "num_candidates": num_candidates,
            "embedding_dim": embedding_dim,
            "k": k,
        }
        self.user_embedding = keras.layers.Embedding(num_users, embedding_dim)
        self.candidate_embedding = keras.layers.Embedding(num_candidates, embedding_dim)
        # Row 0 of the table is no movie.
        self.retrieval = shard_candidates(
            keras_rs.layers.BruteForceRetrieval(k=k, return_scores=False), self.candidate_embedding, exclude_ids=[0]
        )
        self.task = DistributedTwoTowerTask()

    def call(self, user_ids, training=False):
        """Returns the embeddings of the users, and outside of training the movies to recommend to them."""
        user_embeddings = self.user_embedding(user_ids)
        result = {"user_embeddings": user_embeddings}
        if not training:
            result["predictions"] = self.retrieval(user_embeddings)
        return result

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        """Returns the mean squared error of the ratings, each predicted by one user and one movie embedding."""
        return self.task(
            y_pred["user_embeddings"],
            self.candidate_embedding(y["movie_id"]),
            labels=y["rating"],
            sample_weight=sample_weight,
            candidate_mask=y["valid"],
        )

    def get_config(self):
        """Returns the arguments of the constructor."""
        return {**super().get_config(), **self.arguments}


class StopWhereDiverged(keras.callbacks.Callback):
    """Ends training after an epoch whose loss is no number."""

    def on_epoch_end(self, epoch, logs=None):
        """Stops the model where the loss of the epoch is not finite."""
        if not math.isfinite(logs["loss"]):
            self.model.stop_training = True


def choose_devices() -> list[jax.Device]:
    """Returns the devices of --num_devices: accelerators, or on a machine without one as many virtual CPU devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_cpu_devices = FLAGS.num_devices or cores
    jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    # The threads of XLA's pool, by default one a core. Each virtual device that waits in an all-reduce for the others
    # holds one, a few at a time: too small a pool leaves none for those that are waited for, and XLA aborts.
    os.environ.setdefault("NPROC", str(8 * num_cpu_devices))
    devices = jax.devices()
    if FLAGS.num_devices and FLAGS.num_devices > len(devices):
        sys.exit(f"--num_devices={FLAGS.num_devices}: this machine has {len(devices)} ({devices[0].device_kind}).")
    return devices[: FLAGS.num_devices]


def check_files() -> None:
    """Ends the program where a file to be written at its end could not be."""
    if FLAGS.model_path and not FLAGS.model_path.endswith(".keras"):
        sys.exit(f"--model_path={FLAGS.model_path}: the name of the file must end in .keras.")
    for flag in ("model_path", "metrics_json"):
        if FLAGS[flag].value is None:
            continue
        path = FLAGS[flag].value = os.path.expanduser(FLAGS[flag].value)
        directory = pathlib.Path(path).absolute().parent
        if pathlib.Path(path).is_dir() or not os.access(directory, os.W_OK):
            sys.exit(f"--{flag}={path}: no file can be written there. Name one in an existing, writable folder.")
    if (
        FLAGS.model_path
        and FLAGS.metrics_json
        and os.path.realpath(FLAGS.model_path) == os.path.realpath(FLAGS.metrics_json)
    ):
        sys.exit(f"--model_path and --metrics_json: both are {FLAGS.model_path}. Name two files.")


def choose_users(num_users: int) -> np.ndarray:
    """Returns the users of --users, or a few drawn by the seed; ends the program where one is unknown."""
    if FLAGS.users is None:
        count = min(NUM_DEFAULT_USERS, num_users)
        return np.random.default_rng(FLAGS.seed).choice(np.arange(1, num_users + 1), size=count, replace=False)
    for user in FLAGS.users:
        if not (user.isascii() and user.isdigit() and 1 <= int(user) <= num_users):
            sys.exit(f"--users: there is no user {user!r}. Users are numbered 1 to {num_users}.")
    if not FLAGS.users:
        sys.exit(f"--users: no user is named. Users are numbered 1 to {num_users}.")
    return np.array([int(user) for user in FLAGS.users])


def recommend(model: keras.Model, users: np.ndarray, num_devices: int) -> np.ndarray:
    """Returns the `[len(users), k]` movie ids that the model recommends."""
    padded = np.pad(users.astype("int32"), (0, -len(users) % num_devices), mode="edge")
    return model.predict(padded, batch_size=len(padded), verbose=0)["predictions"][: len(users)]


def main(argv: list[str]) -> None:
    """Trains, recommends, and writes what the flags ask for."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags begin with --.")
    if not FLAGS["verbosity"].present:
        # What JAX and TFDS say at the level that absl sets by itself is of no use here.
        logging.set_verbosity(logging.WARNING)
    check_files()
    seconds = {}

    start = time.perf_counter()
    devices = choose_devices()
    print("Reading the ratings.", flush=True)
    movielens.import_tensorflow_quietly()
    try:
        ratings = movielens.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.seed)
    except movielens.MovieLensUnavailableError as error:
        sys.exit(f"{error} --dataset=auto goes on without it.")
    users = choose_users(ratings.num_users)
    if ratings.num_movies < FLAGS.k:
        sys.exit(f"--k={FLAGS.k}: there are {ratings.num_movies} films.")
    train, validation = movielens.split(ratings, FLAGS.seed)
    print_source(ratings)
    print(
        f"{ratings.num_users} users, {ratings.num_movies} films, {len(train.ratings)} ratings to train on and "
        f"{len(validation.ratings)} to validate on; {len(devices)} {devices[0].platform} device(s)."
    )
    seconds["data"] = time.perf_counter() - start

    start = time.perf_counter()
    if FLAGS.device_mesh:
        mesh = keras.distribution.DeviceMesh((len(devices),), ["batch"], devices)
        distribution = keras.distribution.DataParallel(device_mesh=mesh)
    else:
        distribution = keras.distribution.DataParallel(devices=devices)
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(FLAGS.seed)
    model = RetrievalModel(ratings.num_users + 1, ratings.num_movies + 1, FLAGS.embedding_dim, FLAGS.k)
    model.compile(optimizer=keras.optimizers.Adagrad(learning_rate=FLAGS.learning_rate))
    arrays, batch_size = movielens.divisible_batches(train, FLAGS.batch_size, len(devices))
    validation_arrays, _ = movielens.divisible_batches(validation, FLAGS.batch_size, len(devices))
    validation_epochs = sorted({*range(VALIDATE_EVERY, FLAGS.epochs, VALIDATE_EVERY), FLAGS.epochs})
    history = model.fit(
        arrays.pop("user_id"),
        arrays,
        batch_size=batch_size,
        epochs=FLAGS.epochs,
        validation_data=(validation_arrays.pop("user_id"), validation_arrays),
        validation_freq=validation_epochs,
        callbacks=[StopWhereDiverged()],
        shuffle=False,
        verbose=1 if sys.stdout.isatty() else 2,
    ).history
    seconds["training"] = time.perf_counter() - start
    if not math.isfinite(history["loss"][-1]):
        sys.exit(
            f"The training loss became {history['loss'][-1]} in epoch {len(history['loss'])}. "
            "Try a smaller --learning_rate."
        )
    baseline = float(np.mean((validation.ratings - train.ratings.mean()) ** 2))

    start = time.perf_counter()
    recommended = recommend(model, users, len(devices))
    seconds["recommending"] = time.perf_counter() - start
    if FLAGS.model_path:
        start = time.perf_counter()
        model.save(FLAGS.model_path)
        loaded = keras.models.load_model(FLAGS.model_path)
        if not np.array_equal(recommend(loaded, users, len(devices)), recommended):
            sys.exit(f"The model loaded from {FLAGS.model_path} recommends other films than the one saved there.")
        seconds["saving and loading"] = time.perf_counter() - start

    for user, movie_ids in zip(users, recommended, strict=True):
        taste = "" if ratings.user_tastes is None else f" (taste {ratings.user_tastes[user]})"
        print(f"\nRecommended to user {user}{taste}:")
        for place, movie_id in enumerate(movie_ids, start=1):
            print(f"{place:4d}. {ratings.titles[movie_id]}")
    print(
        f"\nFinal mean squared error of the ratings, scaled to 0..1: {history['loss'][-1]:.4f} in training, "
        f"{history['val_loss'][-1]:.4f} in validation.\nFor comparison, the mean rating predicted for every pair has "
        f"{baseline:.4f} in validation."
    )
    print("Seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items()) + ".")
    if FLAGS.model_path:
        print(f"Model saved to {FLAGS.model_path}; loaded again, it recommends the same.")
    error = None
    if FLAGS.metrics_json:
        recommendations = [
            {"user": int(user), "movie_ids": ids.tolist(), "titles": [ratings.titles[i] for i in ids]}
            for user, ids in zip(users, recommended, strict=True)
        ]
        error = write_metrics(
            num_devices=len(devices),
            device_kind=devices[0].device_kind,
            dataset=ratings.source,
            history=history,
            mean_rating_val_loss=baseline,
            validation_epochs=validation_epochs,
            seconds=seconds,
            recommendations=recommendations,
        )
    print_source(ratings)
    sys.exit(error)


def write_metrics(**metrics) -> str | None:
    """Writes the metrics, flags and versions to --metrics_json; returns what went wrong, or `None`."""
    packages = ("keras", "keras-rs", "jax", "keras_rs_contrib")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    used_flags = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    content = {"flags": used_flags, "versions": versions, **metrics}
    try:
        pathlib.Path(FLAGS.metrics_json).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        return f"--metrics_json={FLAGS.metrics_json}: {error.strerror}. All else is done."
    print(f"Metrics written to {FLAGS.metrics_json}.")
    return None


def print_source(ratings: movielens.Ratings) -> None:
    """Prints whose ratings these are."""
    if ratings.source == "movielens":
        print("Dataset: MovieLens 100K.", flush=True)
        return
    stars = "*" * 100
    print(
        f"{stars}\nDataset: SYNTHETIC, a made-up stand-in for MovieLens. Its films and figures mean nothing outside of "
        f"it;\na good recommendation is a film of the user's taste.\n{stars}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        app.run(main)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter is not to complain while it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
