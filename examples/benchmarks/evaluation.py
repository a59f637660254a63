r"""Times an epoch of training on MovieLens 100K, evaluation, and input checks.

    TFDS_DATA_DIR=... python examples/benchmarks/evaluation.py

The model is that of `movielens_dp.py --objective=retrieval`. The rows of the table:

- `training`: one epoch of `fit`. `training, unchecked`: the same with `check_inputs=False`.
- `pairs`: `evaluate` of all held-out ratings, each ranked among all films, with loss, recall, NDCG and reciprocal rank.
- `users`: `evaluate_queries`, each user once, without the films that the user has rated in training.
- `products`: only the matrix products that `pairs` needs, which are the logits of each batch and its scores with all
  films.

All rows are timed in turns. Each ratio is the median of the ratios of single turns, with quartiles in parentheses.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pathlib
import sys

import jax
import keras
import numpy as np
from absl import app, flags
from timing import Table, in_turns, milliseconds, print_setting, ratio, timed

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import movielens

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    StreamingSamplingProbability,
    TwoTowerModel,
    group_candidate_ids,
)

FLAGS = flags.FLAGS
flags.DEFINE_enum("dataset", "auto", ["auto", "movielens", "synthetic"], "As in the example.")
flags.DEFINE_integer("embedding_dim", 128, "Dimension of the embeddings.", lower_bound=1)
flags.DEFINE_integer("batch_size", 1000, "Ratings per step.", lower_bound=1)
flags.DEFINE_integer("turns", 15, "Maximum number of turns: each turn times each function once.", lower_bound=3)
flags.DEFINE_float("seconds", 120.0, "Time limit in seconds, after at least three turns.")


def make_model(train, check_inputs):
    """Returns the compiled model of the example."""
    num_rows = train.num_movies + 1
    model = TwoTowerModel(
        keras.layers.Embedding(train.num_users + 1, FLAGS.embedding_dim),
        keras.layers.Embedding(num_rows, FLAGS.embedding_dim),
        query_features="user_id",
        candidate_features="movie_id",
        task=DistributedTwoTowerTask(similarity="cosine", temperature=0.2, remove_accidental_hits=True),
        sampling_probability=StreamingSamplingProbability(
            num_rows, counts=np.bincount(train.movie_ids, minlength=num_rows)
        ),
        check_inputs=check_inputs,
    )
    model.compile(keras.optimizers.Adam(0.003))
    return model


def main(argv):
    """Prints the setting and the table."""
    ratings = movielens.load_or_exit(argv, FLAGS.dataset)
    train, held_out = movielens.split(ratings, seed=0)
    data, held_out_data = ({"user_id": part.user_ids, "movie_id": part.movie_ids} for part in (train, held_out))
    users = np.arange(1, ratings.num_users + 1)
    seen = group_candidate_ids(train.user_ids, train.movie_ids, users)
    unseen = group_candidate_ids(held_out.user_ids, held_out.movie_ids, users)
    model, unchecked = make_model(train, True), make_model(train, False)
    queries = jax.numpy.ones((FLAGS.batch_size, FLAGS.embedding_dim))
    candidates, table = queries + 1, jax.numpy.ones((train.num_movies + 1, FLAGS.embedding_dim))

    @jax.jit
    def products(queries, candidates, table):
        # Sums, so that XLA need not keep the products.
        return (queries @ candidates.T).sum(), (queries @ table.T).sum()

    num_batches = -(-len(held_out.ratings) // FLAGS.batch_size)
    arguments = {"batch_size": FLAGS.batch_size, "verbose": 0}
    functions = {
        "training": timed(lambda: model.fit(data, **arguments)),
        "training, unchecked": timed(lambda: unchecked.fit(data, **arguments)),
        "pairs": timed(lambda: model.evaluate(held_out_data, **arguments)),
        "users": timed(lambda: model.evaluate_queries({"user_id": users}, unseen, seen)),
        "products": timed(lambda: [products(queries + i, candidates, table) for i in range(num_batches)]),
    }
    print_setting()
    print(
        f"Dataset: {ratings.source}; {len(train.ratings)} training ratings, {len(held_out.ratings)} held-out ratings, "
        f"{len(users)} users, {ratings.num_movies} films; batches of {FLAGS.batch_size}, {FLAGS.embedding_dim} "
        "dimensions.\n"
    )
    times = in_turns(functions, FLAGS.turns, FLAGS.seconds)
    table = Table()
    for name in functions:
        table.print(
            {
                "": f"{name:<20}",
                "ms": milliseconds(times[name]),
                "/ training": ratio(times[name], times["training"]),
                "/ products": ratio(times[name], times["products"]),
            }
        )
    print("\nThe cost of input checks is the difference between the two training rows.")


if __name__ == "__main__":
    app.run(main)
