"""Retrieval with data parallel training: the keras.io tutorial as a program, and a retrieval objective.

Trains two embedding towers on MovieLens 100K, on one device or many, recommends films, and evaluates the
recommendations. By default the towers predict ratings, as in the tutorial. With --objective=retrieval they learn to
rank films that a user has rated above other films:

    python examples/movielens_dp.py --epochs=50
    python examples/movielens_dp.py --objective=retrieval
    python examples/movielens_dp.py --epochs=50 --num_devices=8 --users=42,7 --model_path=/tmp/movielens.keras
    python examples/launch.py --num_processes=2 examples/movielens_dp.py --epochs=50

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

import checkpoint_flags
import jax
import keras
import keras_rs
import movielens
import numpy as np
import several_processes
from absl import app, flags, logging

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    EvaluateQueries,
    MeanReciprocalRank,
    NDCGAtK,
    RecallAtK,
    StreamingSamplingProbability,
    TwoTowerModel,
    group_candidate_ids,
    shard_candidates,
)

VALIDATE_EVERY = 5
NUM_DEFAULT_USERS = 3
# More virtual devices would exhaust the machine.
MAX_DEVICES = 256

# Defaults of the flags for each objective. Those for ratings are from the tutorial. Those for retrieval performed best
# on a held-out tenth of the training ratings: see `examples/benchmarks/README.md`.
DEFAULTS = {
    "rating": {
        "epochs": 50,
        "batch_size": 1000,
        "embedding_dim": 32,
        "initial_scale": 0.05,
        "similarity": "dot",
        "temperature": 1.0,
        "optimizer": "adagrad",
        "learning_rate": 0.2,
        "schedule": "constant",
        "shuffle": False,
    },
    "retrieval": {
        "epochs": 10,
        "batch_size": 500,
        "embedding_dim": 128,
        "initial_scale": 0.01,
        "similarity": "cosine",
        "temperature": 0.2,
        "optimizer": "adam",
        "learning_rate": 0.003,
        "schedule": "cosine",
        "shuffle": True,
        "sampling_correction": "counts",
        "remove_accidental_hits": True,
    },
}
OPTIMIZERS = {"adagrad": keras.optimizers.Adagrad, "adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}
METRICS = {"recall_at_10": "Recall@10", "ndcg_at_10": "NDCG@10", "mean_reciprocal_rank": "MRR"}

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(checkpoint_flags)


def by_objective(name: str) -> str:
    """Returns the part of a flag's help that states its defaults."""
    return (
        "By default " + ", ".join(f"{d[name]} for {objective}" for objective, d in DEFAULTS.items() if name in d) + "."
    )


flags.DEFINE_enum(
    "objective",
    "rating",
    list(DEFAULTS),
    "`rating`, as in the tutorial: the score of a user and a film predicts the rating. `retrieval`: a film that the "
    "user has rated, high or low, scores higher than the other films of the batch (in-batch softmax).",
)
flags.DEFINE_integer("epochs", None, f"Passes over the training ratings. {by_objective('epochs')}", lower_bound=1)
flags.DEFINE_integer(
    "batch_size", None, f"Ratings per training step, over all devices. {by_objective('batch_size')}", lower_bound=1
)
flags.DEFINE_integer(
    "embedding_dim", None, f"Dimension of the user and movie embeddings. {by_objective('embedding_dim')}", lower_bound=1
)
flags.DEFINE_float(
    "initial_scale",
    None,
    f"Initial embeddings are uniform in [-initial_scale, initial_scale]. {by_objective('initial_scale')}",
)
flags.DEFINE_enum(
    "similarity", None, ["dot", "cosine"], f"Similarity that scores a user and a film. {by_objective('similarity')}"
)
flags.DEFINE_float("temperature", None, f"Positive number that divides scores. {by_objective('temperature')}")
flags.DEFINE_enum("optimizer", None, list(OPTIMIZERS), f"The optimizer. {by_objective('optimizer')}")
flags.DEFINE_float("learning_rate", None, f"Initial learning rate of the optimizer. {by_objective('learning_rate')}")
flags.DEFINE_enum(
    "schedule",
    None,
    ["constant", "cosine"],
    f"Whether the learning rate is constant, or decays to 0 along half a cosine. {by_objective('schedule')}",
)
flags.DEFINE_bool("shuffle", None, f"Shuffle the training ratings in each epoch. {by_objective('shuffle')}")
flags.DEFINE_enum(
    "sampling_correction",
    None,
    ["none", "counts", "streaming"],
    "For retrieval: log-q correction. Subtracts the logarithm of each film's sampling probability from its score, "
    "computed from `counts` of the training ratings, or estimated from the batches (`streaming`). "
    f"{by_objective('sampling_correction')}",
)
flags.DEFINE_bool(
    "remove_accidental_hits",
    None,
    "For retrieval: further occurrences of a user's film in the batch are not negatives. "
    f"{by_objective('remove_accidental_hits')}",
)
flags.DEFINE_bool("include_seen", False, "Also recommend films that the user has rated, as the tutorial does.")
for positive in ("initial_scale", "temperature", "learning_rate"):
    flags.register_validator(
        positive,
        lambda value: value is None or (value > 0 and math.isfinite(value)),
        message="must be positive and finite",
    )
flags.DEFINE_integer(
    "num_devices",
    None,
    "Number of devices of each process. By default, all accelerators or, without any, one virtual CPU device per core.",
    lower_bound=1,
    upper_bound=MAX_DEVICES,
)
flags.DEFINE_bool(
    "device_mesh", False, "Create `DataParallel` from a 1-D `DeviceMesh`, not from the devices: the same distribution."
)
flags.DEFINE_integer(
    "seed",
    42,
    "Seed of the split, the initial embeddings, the batches and the synthetic data.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
flags.DEFINE_integer(
    "split_seed",
    None,
    "Seed of the split into training and validation ratings. By default, --seed.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
flags.DEFINE_bool(
    "tune",
    False,
    "Validate on a tenth of the training ratings instead of the validation ratings, to choose hyperparameters.",
)
flags.DEFINE_integer("k", 10, "Number of films to recommend to each user.", lower_bound=1)
flags.DEFINE_list("users", None, "Users to recommend films to, such as 42,7. By default, three random ones.")
flags.DEFINE_enum(
    "dataset",
    "auto",
    ["auto", "movielens", "synthetic"],
    "`movielens`: MovieLens 100K from --data_dir, downloaded if missing. `synthetic`: generated data of the same "
    "shape. `auto`: MovieLens if available, otherwise synthetic data.",
)
flags.DEFINE_string(
    "data_dir", None, "Directory of TensorFlow Datasets. By default, TFDS_DATA_DIR or ~/tensorflow_datasets."
)
flags.DEFINE_string(
    "model_path", None, "A .keras file to save the model to. The model is loaded again to check the file."
)
flags.DEFINE_string(
    "metrics_json", None, "A JSON file to write flags, versions, history, seconds and recommendations to."
)


def choose_defaults() -> None:
    """Sets flags that are not given to the defaults of the objective. Exits if a given flag does not apply."""
    defaults = DEFAULTS[FLAGS.objective]
    for name in sorted({name for flags_of in DEFAULTS.values() for name in flags_of}):
        if name not in defaults and FLAGS[name].value is not None:
            sys.exit(
                f"--{name}: it has no effect with --objective={FLAGS.objective}. Drop it, or change the objective."
            )
        if FLAGS[name].value is None:
            FLAGS[name].value = defaults.get(name)


def make_model(train: movielens.Ratings, num_steps: int) -> TwoTowerModel:
    """Returns the compiled model that the flags describe.

    Args:
        train: the training ratings.
        num_steps: the total number of training steps, for the schedule of the learning rate.
    """

    def make_embedding(num_rows: int) -> keras.layers.Embedding:
        scale = FLAGS.initial_scale
        return keras.layers.Embedding(
            num_rows, FLAGS.embedding_dim, embeddings_initializer=keras.initializers.RandomUniform(-scale, scale)
        )

    num_rows = train.num_movies + 1
    user_tower, movie_tower = make_embedding(train.num_users + 1), make_embedding(num_rows)
    task = DistributedTwoTowerTask(
        similarity=FLAGS.similarity,
        temperature=FLAGS.temperature,
        remove_accidental_hits=bool(FLAGS.remove_accidental_hits),
    )
    sampling_probability = None
    if FLAGS.sampling_correction == "counts":
        counts = np.bincount(train.movie_ids, minlength=num_rows)
        sampling_probability = StreamingSamplingProbability(num_rows, counts=counts)
    elif FLAGS.sampling_correction == "streaming":
        sampling_probability = StreamingSamplingProbability(num_rows)
    model = TwoTowerModel(
        user_tower,
        movie_tower,
        query_features="user_id",
        candidate_features="movie_id",
        label="rating" if FLAGS.objective == "rating" else None,
        task=task,
        # Row 0 of the table is unused: movie ids start at 1.
        retrieval=shard_candidates(
            keras_rs.layers.BruteForceRetrieval(k=FLAGS.k), movie_tower, exclude_ids=[0], similarity=FLAGS.similarity
        ),
        sampling_probability=sampling_probability,
        # `EvaluateQueries` computes metrics per user instead of per pair.
        corpus_metrics=[],
    )
    learning_rate = FLAGS.learning_rate
    if FLAGS.schedule == "cosine":
        learning_rate = keras.optimizers.schedules.CosineDecay(learning_rate, num_steps)
    model.compile(OPTIMIZERS[FLAGS.optimizer](learning_rate))
    return model


def make_features(ratings: movielens.Ratings) -> dict[str, np.ndarray]:
    """Returns the features of all ratings, as a dict of `[num_ratings]` arrays."""
    features = {"user_id": ratings.user_ids, "movie_id": ratings.movie_ids}
    return {**features, "rating": ratings.ratings} if FLAGS.objective == "rating" else features


def make_metrics() -> list[keras.metrics.Metric]:
    """Returns the metrics of `METRICS`."""
    return [RecallAtK(10), NDCGAtK(10), MeanReciprocalRank()]


def evaluate_popularity(train: movielens.Ratings, unseen: np.ndarray, seen: np.ndarray) -> dict[str, float]:
    """Returns the metrics of a baseline: recommend the films with the most ratings that the user has not rated.

    Args:
        train: the training ratings, which define popularity.
        unseen: `[num_users, m]` int32 ids of held-out films, the positives.
        seen: `[num_users, n]` int32 ids of excluded films.

    Returns:
        Dict of the value of each metric by name.
    """
    counts = np.bincount(train.movie_ids, minlength=train.num_movies + 1).astype("float32")
    tower = keras.layers.Embedding(len(counts), 1, weights=counts[:, None])
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=10), tower, exclude_ids=[0])
    ranks = index.ranks(np.ones((len(unseen), 1), "float32"), unseen, exclude_ids=seen)
    metrics = make_metrics()
    for metric in metrics:
        metric.update_state(ranks)
    return {metric.name: float(metric.result()) for metric in metrics}


def print_metrics(rows: dict[str, dict[str, float]]) -> None:
    """Prints a table of metrics with one line for each of the `rows`."""
    print("Held-out films, ranked for each user among all films that the user has not rated in training:")
    print(" " * 28 + "".join(f"{title:>11}" for title in METRICS.values()))
    for name, values in rows.items():
        print(f"  {name:<26}" + "".join(f"{values[metric]:11.4f}" for metric in METRICS), flush=True)


def choose_devices() -> list[jax.Device]:
    """Returns the --num_devices first devices of each process: accelerators or, without any, virtual CPU devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_cpu_devices = FLAGS.num_devices or cores
    jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    # The number of threads of XLA's pool, by default one per core. Each virtual device that waits in an all-reduce
    # holds one or more threads. If the pool is too small, no thread remains for the other devices, and XLA aborts.
    os.environ.setdefault("NPROC", str(8 * num_cpu_devices))
    several_processes.join()
    devices = jax.local_devices()
    if FLAGS.num_devices and FLAGS.num_devices > len(devices):
        sys.exit(
            f"--num_devices={FLAGS.num_devices}: this machine has only {len(devices)} device(s) "
            f"({devices[0].device_kind}). Use fewer."
        )
    return several_processes.first_devices(FLAGS.num_devices)


def check_files() -> None:
    """Exits if an output file of the flags cannot be written."""
    if FLAGS.model_path and not FLAGS.model_path.endswith(".keras"):
        sys.exit(f"--model_path={FLAGS.model_path}: the name of the file must end in .keras.")
    for flag in ("model_path", "metrics_json"):
        if FLAGS[flag].value is None:
            continue
        path = FLAGS[flag].value = os.path.expanduser(FLAGS[flag].value)
        directory = pathlib.Path(path).absolute().parent
        if pathlib.Path(path).is_dir() or not os.access(directory, os.W_OK):
            sys.exit(f"--{flag}={path}: no file can be written there. Use a path in an existing, writable directory.")
    if (
        FLAGS.model_path
        and FLAGS.metrics_json
        and os.path.realpath(FLAGS.model_path) == os.path.realpath(FLAGS.metrics_json)
    ):
        sys.exit(f"--model_path and --metrics_json: both are {FLAGS.model_path}. Use two different files.")


def choose_users(num_users: int) -> np.ndarray:
    """Returns the users of --users, or a few random ones by default. Exits if a user does not exist."""
    if FLAGS.users is None:
        count = min(NUM_DEFAULT_USERS, num_users)
        return np.random.default_rng(FLAGS.seed).choice(np.arange(1, num_users + 1), size=count, replace=False)
    for user in FLAGS.users:
        if not (user.isascii() and user.isdigit() and 1 <= int(user) <= num_users):
            sys.exit(f"--users: user {user!r} does not exist. Users are numbered 1 to {num_users}.")
    if not FLAGS.users:
        sys.exit(f"--users: the list is empty. Users are numbered 1 to {num_users}.")
    return np.array([int(user) for user in FLAGS.users])


def main(argv: list[str]) -> None:
    """Trains, recommends, evaluates, and writes the files of the flags."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    if not FLAGS["verbosity"].present:
        # At the default level of absl, JAX and TFDS log many messages that do not help here.
        logging.set_verbosity(logging.WARNING)
    choose_defaults()
    check_files()
    seconds = {}

    start = time.perf_counter()
    devices = choose_devices()
    print("Reading the ratings.", flush=True)
    movielens.import_tensorflow_quietly()
    try:
        ratings = movielens.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.seed)
    except movielens.MovieLensUnavailableError as error:
        sys.exit(f"{error} Use --dataset=auto to continue with synthetic data.")
    users = choose_users(ratings.num_users)
    if ratings.num_movies < FLAGS.k:
        sys.exit(f"--k={FLAGS.k}: there are only {ratings.num_movies} films. Use a smaller k.")
    split_seed = FLAGS.seed if FLAGS.split_seed is None else FLAGS.split_seed
    train, validation = movielens.split(ratings, split_seed)
    if FLAGS.tune:
        train, validation = movielens.split(train, split_seed, train_share=0.9)
    print_source(ratings)
    print(
        f"{ratings.num_users} users, {ratings.num_movies} films, {len(train.ratings)} training ratings, "
        f"{len(validation.ratings)} validation ratings; {len(devices)} {devices[0].platform} device(s)"
        f"{f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''}."
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
    model = make_model(train, FLAGS.epochs * math.ceil(len(train.ratings) / FLAGS.batch_size))
    all_users = np.arange(1, ratings.num_users + 1)
    seen = group_candidate_ids(train.user_ids, train.movie_ids, all_users)
    unseen = group_candidate_ids(validation.user_ids, validation.movie_ids, all_users)
    popularity = evaluate_popularity(train, unseen, seen)
    print_metrics({"the most popular films": popularity})
    validation_epochs = sorted({*range(VALIDATE_EVERY, FLAGS.epochs, VALIDATE_EVERY), FLAGS.epochs})
    evaluate_users = EvaluateQueries(
        {"user_id": all_users}, unseen, seen, make_metrics(), epochs=validation_epochs, prefix="val_user_"
    )
    try:
        history = model.fit(
            make_features(train),
            batch_size=FLAGS.batch_size,
            epochs=FLAGS.epochs,
            validation_data=make_features(validation),
            validation_freq=validation_epochs,
            callbacks=[evaluate_users, *checkpoint_flags.checkpoints()],
            shuffle=FLAGS.shuffle,
            verbose=1 if sys.stdout.isatty() else 2,
        ).history
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        rate = f" The learning rate is --learning_rate={FLAGS.learning_rate}." if "finite" in str(error) else ""
        sys.exit(f"{error}{rate}")
    seconds["training"] = time.perf_counter() - start

    start = time.perf_counter()
    rated = None if FLAGS.include_seen else group_candidate_ids(ratings.user_ids, ratings.movie_ids, users)
    recommended = model.recommend({"user_id": users}, exclude_ids=rated).ids
    seconds["recommending"] = time.perf_counter() - start
    if FLAGS.model_path:
        start = time.perf_counter()
        model.save(FLAGS.model_path)
        loaded = keras.models.load_model(FLAGS.model_path)
        if not np.array_equal(loaded.recommend({"user_id": users}, exclude_ids=rated).ids, recommended):
            sys.exit(f"The model loaded from {FLAGS.model_path} recommends other films than the saved model.")
        seconds["saving and loading"] = time.perf_counter() - start

    # For a user who has rated nearly all films, fewer than k remain.
    recommendations = [
        {"user": int(user), "movie_ids": ids.tolist(), "titles": [ratings.titles[i] for i in ids]}
        for user, ids in zip(users, [ids[ids > 0] for ids in recommended], strict=True)
    ]
    for recommendation in recommendations:
        taste = "" if ratings.user_tastes is None else f" (taste {ratings.user_tastes[recommendation['user']]})"
        print(f"\nRecommended to user {recommendation['user']}{taste}:")
        for place, title in enumerate(recommendation["titles"], start=1):
            print(f"{place:4d}. {title}")
    print()
    metrics = {name: history[f"val_user_{name}"][-1] for name in METRICS}
    print_metrics({"the most popular films": popularity, f"this model ({FLAGS.objective})": metrics})
    if FLAGS.objective == "rating":
        baseline = float(np.mean((validation.ratings - train.ratings.mean()) ** 2))
        print(
            f"Final mean squared error of the ratings, scaled to 0..1: {history['loss'][-1]:.4f} in training, "
            f"{history['val_loss'][-1]:.4f} in validation.\nFor comparison, predicting the mean rating for every pair "
            f"gives {baseline:.4f} in validation."
        )
    else:
        baseline = None
        print(
            f"Final cross-entropy of a film among those of its batch: {history['loss'][-1]:.4f} in training, "
            f"{history['val_loss'][-1]:.4f} in validation."
        )
    print("Seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items()) + ".")
    if FLAGS.model_path:
        print(f"Model saved to {FLAGS.model_path}. The loaded model recommends the same films.")
    error = None
    if FLAGS.metrics_json and jax.process_index() == 0:
        error = write_metrics(
            num_devices=len(devices),
            device_kind=devices[0].device_kind,
            dataset=ratings.source,
            history=history,
            user_metrics=metrics,
            popularity_metrics=popularity,
            mean_rating_val_loss=baseline,
            validation_epochs=validation_epochs,
            seconds=seconds,
            recommendations=recommendations,
        )
    print_source(ratings)
    sys.exit(error)


def write_metrics(**metrics) -> str | None:
    """Writes the metrics, flags and versions to --metrics_json. Returns an error message, or `None`."""
    packages = ("keras", "keras-rs", "jax", "keras_rs_contrib")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    used_flags = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])}
    content = {"flags": used_flags, "versions": versions, **metrics}
    try:
        pathlib.Path(FLAGS.metrics_json).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        return f"--metrics_json={FLAGS.metrics_json}: {error.strerror}. Everything else is complete."
    print(f"Metrics written to {FLAGS.metrics_json}.")
    return None


def print_source(ratings: movielens.Ratings) -> None:
    """Prints the source of the ratings."""
    if ratings.source == "movielens":
        print("Dataset: MovieLens 100K.", flush=True)
        return
    stars = "*" * 100
    print(
        f"{stars}\nDataset: SYNTHETIC, generated in place of MovieLens. Its films and metrics say nothing about real "
        f"data.\nA good recommendation is a film of the user's taste.\n{stars}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        app.run(main)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    except BrokenPipeError:
        # The reader of the output has closed it. This prevents a second error when the interpreter flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
