"""A recommender from your own data: a file that says who used which item, and when.

Trains a `TwoTowerModel`, compares it with popularity on held-out rows, shows recommendations, and saves the model:

    python examples/own_data.py --interactions=ratings.csv --user_column=user --item_column=movie --time_column=time
    python examples/own_data.py --interactions=ratings.csv --user_column=user --item_column=movie --time_column=time \
        --titles=movies.csv --tower=history --plots=plots --recommend_for=u42,u7

Asks the saved model, without training. With the file of interactions, a model of histories also knows what users have
done since, and nobody is recommended what the file says that they have used:

    python examples/own_data.py --model_path=recommender.keras --recommend_for=u42,u7
    python examples/own_data.py --notrain --recommend_for=u42 --interactions=new_ratings.csv --user_column=user \
        --item_column=movie --time_column=time

Files without a header need the names of their columns, here for MovieLens 1M:

    python examples/own_data.py --interactions=ratings.dat --column_names=user,movie,stars,time --user_column=user \
        --item_column=movie --time_column=time --titles=movies.dat --titles_column_names=movie,title,genres \
        --encoding=latin-1

The model learns from the training rows only: it has never seen the held-out rows on which it is compared.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import sys
import time
import warnings
import zipfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import item_titles
import jax
import keras
import movielens
import numpy as np
import pandas as pd
from absl import app, flags, logging

from keras_rs_contrib import (
    EvaluateQueries,
    HistoryTower,
    MeanReciprocalRank,
    NDCGAtK,
    RecallAtK,
    TwoTowerModel,
    Vocabulary,
    group_candidate_ids,
    interactions,
)

NUM_DEFAULT_USERS = 3
# What the history tower looks at, and how often it learns without the user's own row: new users have only a history.
HISTORY_LENGTH = 10
QUERY_DROPOUT = 0.2
METRICS = {"recall_at_10": "recall@10", "ndcg_at_10": "NDCG@10", "mean_reciprocal_rank": "MRR"}
K_OF_METRICS = 10

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "interactions", None, "File with a row for each interaction: CSV, other separated text, or Parquet."
)
flags.DEFINE_string("user_column", None, "The name of its column of users.")
flags.DEFINE_string("item_column", None, "The name of its column of items.")
flags.DEFINE_string("time_column", None, "The name of its column of times: numbers, or dates as in ISO 8601.")
flags.DEFINE_string("rating_column", None, "The name of its column of ratings, for --minimum_rating.")
flags.DEFINE_float("minimum_rating", None, "Rows with a lower rating are left out.")
flags.DEFINE_list("column_names", None, "The names of all columns, for a file without a header.")
flags.DEFINE_string("sep", None, r"What separates fields, such as , or \t. By default, it is found out.")
flags.DEFINE_string("encoding", "utf-8", "Encoding of the files, such as latin-1.")
flags.DEFINE_string("titles", None, "File with the titles of items: CSV or other separated text.")
flags.DEFINE_string("titles_item_column", None, "The name of its column of items. By default, as in --item_column.")
flags.DEFINE_string("title_column", None, "The name of its column of titles. By default: title, movie_title or name.")
flags.DEFINE_list("titles_column_names", None, "The names of all its columns, if it has no header.")
flags.DEFINE_integer("min_user", 1, "Leave out users with fewer rows.", lower_bound=1)
flags.DEFINE_integer("min_item", 1, "Leave out items with fewer rows.", lower_bound=1)
flags.DEFINE_enum(
    "split",
    None,
    ["time", "random", "leave_last_out"],
    "Which rows are held out: a fifth, the latest by `time` or `random` ones, or the last row of each user. "
    "By default, `time` with --time_column, and otherwise `random`.",
)
flags.DEFINE_enum(
    "tower",
    "ids",
    ["ids", "history"],
    f"What the model knows of a user: `ids`, an embedding of its own; `history`, also its last {HISTORY_LENGTH} items.",
)
flags.DEFINE_integer("epochs", 10, "Passes over the training rows.", lower_bound=1)
flags.DEFINE_integer("batch_size", 256, "Rows per training step, over all devices.", lower_bound=1)
flags.DEFINE_integer("embedding_dim", 64, "Dimension of the embeddings of users and items.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.001, "Learning rate of Adam.")
flags.DEFINE_integer("num_devices", None, "Number of devices. By default, all that JAX has.", lower_bound=1)
flags.DEFINE_integer(
    "seed", 42, "Seed of a random split, the embeddings and the batches.", lower_bound=0, upper_bound=2**32 - 1
)
flags.DEFINE_integer("k", 10, "Number of items to recommend to each user.", lower_bound=1)
flags.DEFINE_list("users", None, "Users to show recommendations for. By default, a few random ones with held-out rows.")
flags.DEFINE_string("model_path", "recommender.keras", "A .keras file to save the model to, or to load it from.")
flags.DEFINE_list("recommend_for", None, "Users to recommend to by the saved model, such as u42,u7.")
flags.DEFINE_bool("train", True, "Train a model on --interactions. Otherwise, or without them, load --model_path.")
flags.DEFINE_string("plots", None, "Folder for plots of metrics, items and recall (PNG). Needs matplotlib.")
flags.register_validator(
    "learning_rate", lambda value: value > 0 and math.isfinite(value), message="must be positive and finite"
)
# Flags without an effect on a saved model.
OF_TRAINING = (
    "min_user", "min_item", "split", "tower", "epochs", "batch_size", "embedding_dim", "learning_rate", "num_devices",
    "seed", "users", "plots",
)  # fmt: skip
OF_INTERACTIONS = (
    "user_column", "item_column", "time_column", "rating_column", "minimum_rating", "column_names", "sep",
)  # fmt: skip
OF_TITLES = ("titles_item_column", "title_column", "titles_column_names")


@dataclasses.dataclass
class Parts:
    """The rows for training and for testing.

    Attributes:
        train: the rows for training.
        test: all rows held out.
        positives: those of `test` that a list can have: with an item of `train`, which its user has not used there.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    positives: pd.DataFrame


@contextlib.contextmanager
def exit_on_errors(flag: str):
    """Ends the program with one line if the value of a flag cannot be used."""
    try:
        yield
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        # The system says only what is wrong.
        is_of_system = isinstance(error, OSError) and error.strerror is not None
        text = f"{error.strerror}. Use another path." if is_of_system else str(error)
        sys.exit(f"--{flag}={FLAGS[flag].value}: {' '.join(text.split())}")


def check_flags() -> bool:
    """Returns whether to train. Exits if flags do not fit together, or if an output cannot be written."""
    is_training = FLAGS.train and FLAGS.interactions is not None
    if FLAGS.recommend_for == []:
        sys.exit("--recommend_for: the list is empty. Name users, such as u42,u7, or drop it.")
    if FLAGS.interactions is None and not FLAGS.recommend_for:
        sys.exit(
            "--interactions: it must name a file to learn from, with --user_column and --item_column. "
            "Or pass --recommend_for, to ask the model in --model_path."
        )
    if not is_training and not FLAGS.recommend_for:
        sys.exit("--recommend_for: a saved model needs users to recommend to. Name some, or drop --notrain.")
    needs = [(OF_TRAINING, is_training, "without training")]
    needs += [(OF_INTERACTIONS, FLAGS.interactions is not None, "without --interactions")]
    needs += [(OF_TITLES, FLAGS.titles is not None, "without --titles")]
    for names, is_used, when in needs:
        for name in names:
            if not is_used and FLAGS[name].present:
                sys.exit(f"--{name}: it has no effect {when}. Drop it.")
    if FLAGS.interactions is not None:
        for name in ("user_column", "item_column"):
            if not FLAGS[name].value:
                sys.exit(f"--{name}: it must name a column of --interactions={FLAGS.interactions}.")
    if (FLAGS.rating_column is None) != (FLAGS.minimum_rating is None):
        sys.exit("--rating_column and --minimum_rating: one has no effect without the other. Pass both, or neither.")
    if is_training:
        FLAGS.split = FLAGS.split or ("random" if FLAGS.time_column is None else "time")
        for name, value in (("split", "time"), ("split", "leave_last_out"), ("tower", "history")):
            if FLAGS[name].value == value and FLAGS.time_column is None:
                sys.exit(f"--{name}={value}: it needs the times of rows. Pass --time_column.")
    FLAGS.model_path = os.path.expanduser(FLAGS.model_path)
    if not FLAGS.model_path.endswith(".keras"):
        sys.exit(f"--model_path={FLAGS.model_path}: the name of the file must end in .keras.")
    if not is_training and not pathlib.Path(FLAGS.model_path).is_file():
        sys.exit(f"--model_path={FLAGS.model_path}: no such file. Train a model first, with --interactions.")
    if is_training:
        check_outputs()
    return is_training


def check_outputs() -> None:
    """Exits if the model or the plots cannot be written."""
    path = pathlib.Path(FLAGS.model_path)
    target = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(target, os.W_OK):
        sys.exit(f"--model_path={path}: no file can be written there. Use a path in an existing, writable folder.")
    if FLAGS.plots is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit(f"--plots={FLAGS.plots}: it needs matplotlib. Install it (pip install matplotlib), or drop the flag.")
    FLAGS.plots = os.path.expanduser(FLAGS.plots)
    with exit_on_errors("plots"):
        pathlib.Path(FLAGS.plots).mkdir(parents=True, exist_ok=True)
    if not os.access(FLAGS.plots, os.W_OK):
        sys.exit(f"--plots={FLAGS.plots}: no file can be written there. Use a writable folder.")


def read_rows() -> pd.DataFrame:
    """Returns the interactions, and prints what was read. Exits if the file cannot be read."""
    print(f"Reading {FLAGS.interactions}.", flush=True)
    with warnings.catch_warnings(record=True) as caught, exit_on_errors("interactions"):
        warnings.simplefilter("always", UserWarning)
        rows = interactions.read_interactions(
            FLAGS.interactions,
            user_column=FLAGS.user_column,
            item_column=FLAGS.item_column,
            time_column=FLAGS.time_column,
            rating_column=FLAGS.rating_column,
            column_names=FLAGS.column_names,
            sep=None if FLAGS.sep is None else FLAGS.sep.replace(r"\t", "\t"),
            encoding=FLAGS.encoding,
        )
    for warning in caught:
        print(warning.message)
    print(f"{len(rows):,} rows, {describe(rows)}.")
    if FLAGS.minimum_rating is not None:
        with exit_on_errors("minimum_rating"):
            rows = interactions.rated_at_least(rows, FLAGS.rating_column, FLAGS.minimum_rating)
        print(f"{len(rows):,} rows with a rating of {FLAGS.minimum_rating:g} or more, {describe(rows)}.")
    return rows


def describe(rows: pd.DataFrame) -> str:
    """Returns how many users and items there are, and from when to when."""
    text = f"{rows[FLAGS.user_column].nunique():,} users, {rows[FLAGS.item_column].nunique():,} items"
    if FLAGS.time_column is None:
        return text
    first, last = rows[FLAGS.time_column].min(), rows[FLAGS.time_column].max()
    if not isinstance(first, pd.Timestamp) and 1e8 <= first <= last < 1e10:
        # Seconds since 1970 of the years 1973 to 2286.
        first, last = (pd.Timestamp(value, unit="s") for value in (first, last))
    return f"{text}, times {first} to {last}"


def read_titles(item_column: str, items: list) -> dict[str, str]:
    """Returns the titles of items, if there is a file, and prints how many have none. Exits if it cannot be read."""
    if FLAGS.titles is None:
        return {}
    with exit_on_errors("titles"):
        titles = item_titles.read_titles(
            os.path.expanduser(FLAGS.titles),
            FLAGS.titles_item_column or item_column,
            FLAGS.title_column,
            FLAGS.titles_column_names,
            FLAGS.encoding,
        )
    num_missing = sum(str(item) not in titles for item in items)
    print(f"{len(titles):,} titles in {FLAGS.titles}; {num_missing:,} of {len(items):,} items have none.", flush=True)
    return titles


def split_rows(rows: pd.DataFrame) -> Parts:
    """Returns the rows for training and testing, and prints their numbers. Exits if they cannot be split."""
    user, item = FLAGS.user_column, FLAGS.item_column
    if FLAGS.min_user > 1 or FLAGS.min_item > 1:
        with exit_on_errors("min_item" if FLAGS.min_item > 1 else "min_user"):
            rows = interactions.k_core(rows, user, item, min_user=FLAGS.min_user, min_item=FLAGS.min_item)
        print(f"{len(rows):,} rows of users and items that have enough of them, {describe(rows)}.")
    if FLAGS.split == "time" and rows[FLAGS.time_column].nunique() < 2:
        sys.exit("--split=time: all rows have the same time. Use --split=random.")
    with exit_on_errors("split"):
        if FLAGS.split == "time":
            train, test = interactions.split_by_time(rows, FLAGS.time_column)
        elif FLAGS.split == "leave_last_out":
            train, test = interactions.leave_last_out(rows, user, FLAGS.time_column)
        else:
            train, test = interactions.random_split(rows, seed=FLAGS.seed)
    is_known = test[item].isin(train[item])
    is_repeated = pd.MultiIndex.from_frame(test[[user, item]]).isin(pd.MultiIndex.from_frame(train[[user, item]]))
    parts = Parts(train, test, test[is_known & ~is_repeated])
    num_new = test[user].nunique() - test[user][test[user].isin(train[user])].nunique()
    print(f"For training: {len(train):,} rows, {describe(train)}.")
    print(f"For testing (--split={FLAGS.split}): {len(test):,} rows, {describe(test)}.")
    if num_new:
        print(f"{num_new:,} of the users for testing are unknown: they get the most popular items.")
    if len(parts.positives) < len(test):
        print(
            f"Not tested: {(~is_known).sum():,} rows of unknown items, and {is_repeated.sum():,} rows that repeat "
            "training rows, whose items are not recommended again."
        )
    if not len(parts.positives):
        sys.exit(f"--split={FLAGS.split}: none of the rows for testing can be tested. Use another split, or more data.")
    return parts


def names_of(texts: list[str], vocabulary: Vocabulary) -> list:
    """Returns the names that are written like this, with an unknown name for each text that is not."""
    names = vocabulary.names
    by_text = {str(name): name for name in names}
    unknown = max(names) + (1 if isinstance(names[0], int) else "?")
    return [by_text.get(text.strip(), unknown) for text in texts]


def choose_users(parts: Parts) -> list:
    """Returns the users of --users, or a few random ones by default. Exits if a user does not exist."""
    users = pd.concat([parts.train, parts.test])[FLAGS.user_column].unique().tolist()
    if FLAGS.users is None:
        tested, known = parts.positives[FLAGS.user_column].unique().tolist(), set(parts.train[FLAGS.user_column])
        tested = [user for user in tested if user in known] or tested
        chosen = np.random.default_rng(FLAGS.seed).permutation(len(tested))[:NUM_DEFAULT_USERS]
        return [tested[place] for place in chosen]
    by_text = {str(user): user for user in users}
    for user in FLAGS.users:
        if user.strip() not in by_text:
            some = ", ".join(list(by_text)[:3])
            sys.exit(f"--users: user {user!r} does not exist. There are {len(users):,} users, such as {some}.")
    if not FLAGS.users:
        sys.exit("--users: the list is empty. Name users, or drop the flag.")
    return [by_text[user.strip()] for user in FLAGS.users]


def make_model(train: pd.DataFrame) -> TwoTowerModel:
    """Returns the compiled model that the flags describe."""
    user, item = FLAGS.user_column, FLAGS.item_column
    users, items = Vocabulary.from_data(train[user]), Vocabulary.from_data(train[item])
    user_table = keras.layers.Embedding(len(users), FLAGS.embedding_dim)
    item_table = keras.layers.Embedding(len(items), FLAGS.embedding_dim)
    vocabularies = {user: users, item: items}
    # The k of the default metrics would be that of a small index.
    metrics = [RecallAtK(K_OF_METRICS), NDCGAtK(K_OF_METRICS), MeanReciprocalRank()]
    arguments = {"vocabularies": vocabularies, "corpus_metrics": metrics}
    if FLAGS.tower == "ids":
        model = TwoTowerModel(user_table, item_table, user, item, **arguments)
    else:
        # Longer than each of the columns, so not one of them.
        history = f"{user} {item} history"
        tower = HistoryTower(
            item_table,
            history,
            query_table=user_table,
            query_feature=user,
            query_dropout=QUERY_DROPOUT,
            mask_zero=True,
            max_length=HISTORY_LENGTH,
        )
        vocabularies[history] = items
        model = TwoTowerModel(tower, item_table, [user, history], item, query_id=user, **arguments)
    model.compile(keras.optimizers.Adam(FLAGS.learning_rate))
    return model


def history_feature(model: TwoTowerModel) -> str | None:
    """Returns the name of the feature with histories, or `None` if the model knows users by their ids alone."""
    names = [] if isinstance(model.query_features, str) else model.query_features
    return next((name for name in names if name != model.query_id), None)


def training_features(model: TwoTowerModel, train: pd.DataFrame) -> dict:
    """Returns the features of the training rows."""
    user, item = model.query_id, model.candidate_id
    features = {user: train[user], item: train[item]}
    history = history_feature(model)
    if history is not None:
        # Of the training rows alone: what is held out must not occur in a history.
        features[history] = interactions.histories(train[user], train[item], train[FLAGS.time_column], HISTORY_LENGTH)
    return features


def query_features(model: TwoTowerModel, users: list, users_of_rows: list, items: list, times) -> dict:
    """Returns the features of users.

    Args:
        model: the model.
        users: `[num_users]` names.
        users_of_rows: the user of each row that histories are from.
        items: the item of each row.
        times: the time of each row, or `None` if rows are in order.
    """
    history = history_feature(model)
    if history is None:
        return {model.query_id: users}
    padding = -1 if isinstance(model.vocabularies[model.candidate_id].names[0], int) else None
    rows = np.full((len(users), HISTORY_LENGTH), padding, object if padding is None else "int64")
    if len(items):
        names, histories = interactions.last_items(users_of_rows, items, times, HISTORY_LENGTH)
        places = pd.Index(names).get_indexer(users)
        rows[places >= 0] = histories[places[places >= 0]]
    return {model.query_id: users, history: rows}


class PrintEpochs(keras.callbacks.Callback):
    """Prints a progress bar in a terminal, and a line for each epoch, within 80 columns."""

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the bar."""
        self.start = time.perf_counter()
        self.bar = keras.utils.Progbar(self.params["steps"], stateful_metrics=["loss"]) if sys.stdout.isatty() else None

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(batch + 1, [("loss", logs["loss"])], finalize=batch + 1 == self.params["steps"])

    def on_epoch_end(self, epoch, logs=None):
        """Prints the line."""
        epochs, seconds = self.params["epochs"], time.perf_counter() - self.start
        metrics = "".join(f"  {title} {logs[f'val_{name}']:.4f}" for name, title in METRICS.items())
        print(f"Epoch {epoch + 1:{len(str(epochs))}}/{epochs}  loss {logs['loss']:.4f}{metrics}  {seconds:.1f} s")
        sys.stdout.flush()


def print_metrics(tables: dict[str, dict[str, float]]) -> None:
    """Prints a table of metrics with one line for each of the rankings."""
    print("\nHeld-out items in each user's list of all items that it has not used before:")
    print(" " * 40 + "".join(f"{title:>12}" for title in METRICS.values()))
    for name, values in tables.items():
        print(f"  {name:<38}" + "".join(f"{values[metric]:12.4f}" for metric in METRICS), flush=True)


def print_recommendations(user: str, items: list, titles: dict[str, str], note: str, used: frozenset = frozenset()):
    """Prints a list of items by title, and marks those that the user has used in the test part."""
    print(f"\nRecommended to {user}{note}:")
    # For a user who has used nearly all items, fewer than k remain.
    for place, item in enumerate([item for item in items if item is not None], start=1):
        print(f"{place:4d}. {titles.get(str(item), str(item))}{'  *' if item in used else ''}")


def train_and_compare(rows: pd.DataFrame, titles: dict[str, str]) -> None:
    """Trains a model, compares it with popularity, shows recommendations, plots, and saves the model."""
    user, item = FLAGS.user_column, FLAGS.item_column
    parts = split_rows(rows)
    shown = choose_users(parts)
    num_items = parts.train[item].nunique()
    if num_items < FLAGS.k:
        sys.exit(f"--k={FLAGS.k}: there are only {num_items} items. Use a smaller k.")
    devices = jax.devices()
    if FLAGS.num_devices is not None and FLAGS.num_devices > len(devices):
        sys.exit(f"--num_devices={FLAGS.num_devices}: JAX has only {len(devices)} device(s) here. Use fewer.")
    devices = devices[: FLAGS.num_devices]
    if len(devices) > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    keras.utils.set_random_seed(FLAGS.seed)
    with exit_on_errors("tower"):
        model = make_model(parts.train)
        features = training_features(model, parts.train)
    past = parts.train
    times = None if FLAGS.time_column is None else past[FLAGS.time_column]

    def features_of(users: list) -> dict:
        return query_features(model, users, past[user], past[item], times)

    tested = parts.positives[user].unique().tolist()
    queries, positives = features_of(tested), group_candidate_ids(parts.positives[user], parts.positives[item], tested)
    kind = devices[0].platform
    print(f"\nTraining on {len(devices)} {kind} device(s), testing on {len(tested):,} users.", flush=True)
    try:
        history = model.fit(
            features,
            batch_size=FLAGS.batch_size,
            epochs=FLAGS.epochs,
            callbacks=[EvaluateQueries(queries, positives, prefix="val_"), PrintEpochs()],
            verbose=0,
            seen="training",
        ).history
    except ValueError as error:
        sys.exit(f"{error} The learning rate is --learning_rate={FLAGS.learning_rate}.")

    popularity = model.evaluate_queries(queries, positives, by_popularity=True)
    tables = {"popularity": popularity, "this model": {name: history[f"val_{name}"][-1] for name in METRICS}}
    is_known = pd.Series(tested).isin(past[user]).to_numpy()
    if 0 < is_known.sum() < len(tested):
        known = features_of([name for name, known in zip(tested, is_known, strict=True) if known])
        number = f"known users ({is_known.sum():,})"
        for name, by_popularity in (("popularity", True), ("this model", False)):
            tables[f"{name}, {number}"] = model.evaluate_queries(
                known, positives[is_known], by_popularity=by_popularity
            )
    print_metrics(tables)
    if tables["this model"]["ndcg_at_10"] <= popularity["ndcg_at_10"]:
        print("The model is not better than popularity: try more --epochs, another --learning_rate, or more data.")

    lists = model.recommend(features_of(shown), FLAGS.k)
    for name, items, is_popular in zip(shown, lists.ids, lists.are_popular, strict=True):
        used = frozenset(parts.test[item][parts.test[user] == name])
        note = ", who is unknown in training: the most popular items" if is_popular else ""
        print_recommendations(str(name), items.tolist(), titles, note, used)
    print("* An item that this user has used in the rows for testing.")
    if FLAGS.plots is not None:
        plot(model, parts, queries, history, popularity, titles)
    save(model, features_of(shown), lists)


def save(model: TwoTowerModel, queries: dict, lists) -> None:
    """Saves the model, and checks that the file gives the same recommendations. Exits if it does not."""
    with exit_on_errors("model_path"):
        model.save(FLAGS.model_path)
    loaded = keras.saving.load_model(FLAGS.model_path).recommend(queries, FLAGS.k)
    if not np.array_equal(loaded.ids, lists.ids):
        sys.exit(f"--model_path={FLAGS.model_path}: the loaded model recommends other items than the saved model.")
    print(f"\nSaved the model to {FLAGS.model_path}. Loaded again, it recommends the same items.", flush=True)


def plot(model: TwoTowerModel, parts: Parts, queries: dict, history: dict, popularity: dict, titles: dict) -> None:
    """Writes the plots to --plots."""
    import own_data_plots

    user, item = FLAGS.user_column, FLAGS.item_column
    folder = pathlib.Path(FLAGS.plots)
    shown = {METRICS[name]: name for name in ("ndcg_at_10", "recall_at_10")}
    own_data_plots.plot_epochs(
        folder / "epochs.png",
        {title: history[f"val_{name}"] for title, name in shown.items()},
        {title: popularity[name] for title, name in shown.items()},
    )
    items = model.vocabularies[item]
    counts = np.bincount(items.encode(parts.train[item]), minlength=len(items))[1:]
    own_data_plots.plot_items(
        folder / "items.png",
        keras.ops.convert_to_numpy(model.candidate_tower.embeddings)[1 : len(items)],
        [titles.get(str(name), str(name)) for name in items.names],
        counts,
    )
    pairs = parts.positives[[user, item]].drop_duplicates()
    users = queries[user]
    k = min(K_OF_METRICS, len(counts))
    # What the model recommends to users whom it does not know is popularity.
    seen = group_candidate_ids(parts.train[user], parts.train[item], users)
    unknown = query_features(model, names_of([""] * len(users), model.vocabularies[user]), [], [], None)
    lists = {
        "this model": model.recommend(queries, k).ids,
        "popularity": model.recommend(unknown, k, exclude_ids=seen).ids,
    }
    recommended = {
        name: pd.MultiIndex.from_arrays([np.repeat(np.array(users, object), ids.shape[1]), ids.ravel()])
        for name, ids in lists.items()
    }
    hits = {name: pd.MultiIndex.from_frame(pairs.astype(object)).isin(pair) for name, pair in recommended.items()}
    own_data_plots.plot_recall_by_popularity(
        folder / "recall_by_popularity.png", counts, items.encode(pairs[item]) - 1, hits, k
    )
    print(f"\nWrote epochs.png, items.png and recall_by_popularity.png to {folder}.", flush=True)


def load() -> TwoTowerModel:
    """Returns the model in --model_path. Exits if there is none that this program has saved."""
    try:
        model = keras.saving.load_model(FLAGS.model_path)
    except (LookupError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"--model_path={FLAGS.model_path}: it cannot be loaded. {' '.join(str(error).split())[:300]}")
    names = (getattr(model, "query_id", None), getattr(model, "candidate_id", None))
    if not isinstance(model, TwoTowerModel) or not set(names) <= set(model.vocabularies):
        sys.exit(f"--model_path={FLAGS.model_path}: it is not a model that this program has saved. Train one first.")
    return model


def answer(rows: pd.DataFrame | None, titles: dict[str, str] | None) -> None:
    """Recommends to the users of --recommend_for by the saved model, without what they have used.

    Args:
        rows: the interactions, or `None` if there is no file.
        titles: the titles of items, or `None` if they have not been read.
    """
    model = load()
    items = model.vocabularies[model.candidate_id]
    titles = read_titles(model.candidate_id, items.names) if titles is None else titles
    if len(items) - 1 < FLAGS.k:
        sys.exit(f"--k={FLAGS.k}: there are only {len(items) - 1} items. Use a smaller k.")
    texts = list(dict.fromkeys(text.strip() for text in FLAGS.recommend_for))
    users = names_of(texts, model.vocabularies[model.query_id])
    own_users, own_items, own_times, exclude_ids = [], [], None, None
    if rows is not None:
        # The ids of another file may be strings where those of the model are integers.
        rows = rows[rows[FLAGS.user_column].astype(str).isin(texts)]
        own_users = rows[FLAGS.user_column].astype(str).tolist()
        own_items = names_of(rows[FLAGS.item_column].astype(str).tolist(), items)
        own_times = None if FLAGS.time_column is None else rows[FLAGS.time_column]
        if own_items:
            exclude_ids = group_candidate_ids(own_users, own_items, texts)
    # Users are told apart by how they are written: the model knows all unknown users by one name.
    queries = query_features(model, texts, own_users, own_items, own_times)
    lists = model.recommend({**queries, model.query_id: users}, FLAGS.k, exclude_ids=exclude_ids)
    known = set(model.vocabularies[model.query_id].names)
    for text, user, ids, is_popular in zip(texts, users, lists.ids, lists.are_popular, strict=True):
        note = ", who is unknown to the model"
        note += ": the most popular items" if is_popular else ": by its history"
        print_recommendations(text, ids.tolist(), titles, "" if user in known else note)


def main(argv: list[str]) -> None:
    """Trains and saves a model, or loads it, and recommends."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    if not FLAGS["verbosity"].present:
        # At the default level of absl, JAX logs many messages that do not help here.
        logging.set_verbosity(logging.WARNING)
    is_training = check_flags()
    # Keras imports it later, if it is installed.
    movielens.import_tensorflow_quietly()
    rows = None if FLAGS.interactions is None else read_rows()
    titles = None
    if is_training:
        titles = read_titles(FLAGS.item_column, rows[FLAGS.item_column].unique().tolist())
        train_and_compare(rows, titles)
    if FLAGS.recommend_for:
        answer(rows, titles)


if __name__ == "__main__":
    try:
        app.run(main)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    except BrokenPipeError:
        # The reader of the output has closed it. This prevents a second error when the interpreter flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
