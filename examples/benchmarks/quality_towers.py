"""The two-tower models of `quality.py`."""

import dataclasses

import keras
import keras_rs
import numpy as np
import quality_data
from keras import ops

from keras_rs_contrib import (
    DistributedTwoTowerTask,
    HistoryTower,
    StreamingSamplingProbability,
    TwoTowerModel,
    shard_candidates,
)
from keras_rs_contrib.scores import score_matrix


@dataclasses.dataclass(frozen=True)
class NewRows:
    """How rows of new users are found, with all else fixed: by Adam, in this many steps on all of them at once."""

    temperature: float
    learning_rate: float = 0.01
    steps: int = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters of a model.

    Attributes:
        objective: `"rating"`, as in the tutorial, or `"retrieval"`, an in-batch softmax with log-q correction.
        query: what the query tower knows: `"user"`, `"history"`, or both, `"user+history"`.
        new_rows: how users that are not in training get rows, or `None` if their histories are enough.
    """

    objective: str = "retrieval"
    query: str = "user"
    encoder: str = "mean"
    max_length: int = 100
    dropout: float = 0.0
    query_dropout: float = 0.0
    embedding_dim: int = 128
    initial_scale: float = 0.01
    similarity: str = "cosine"
    temperature: float = 0.2
    optimizer: str = "adam"
    learning_rate: float = 0.003
    weight_decay: float = 0.0
    decays: bool = True
    batch_size: int = 500
    epochs: int = 10
    new_rows: NewRows | None = None


def ranks_of(split, seed, settings):
    """Returns the ranks of the held-out items under a trained model: `[num_queries, m]` int32, -1 for none."""
    keras.utils.set_random_seed(seed)
    features = _features(split, seed, settings)
    model = _model(split, settings)
    _fit(model, features, settings)
    if settings.new_rows is None:
        embeddings = _query_embeddings(model, split, seed, settings)
    else:
        embeddings = _new_rows(model.candidate_tower.embeddings, split, settings)
    return np.asarray(model.retrieval.ranks(embeddings, split.held_out, exclude_ids=split.seen()))


def _query_embeddings(model, split, seed, settings):
    queries = {"user": split.users}
    if "history" in settings.query:
        queries["history"] = quality_data.known_items(split, settings.max_length, _rng(split, seed))
    queries = {name: queries[name] for name in settings.query.split("+")}
    return model.query_tower(queries if len(queries) > 1 else queries[settings.query])


class CorpusLogits(keras.layers.Layer):
    """The logits of all items, for rows of users.

    Args:
        items: `[num_items, embedding_dim]` float32.
        similarity: that of the model.
        temperature: what divides the scores.
    """

    def __init__(self, items, similarity, temperature):
        super().__init__()
        self.items, self.similarity, self.temperature = items, similarity, temperature

    def call(self, rows):
        """Returns `[batch, num_items]`, for `[batch, embedding_dim]` rows."""
        return score_matrix(rows, self.items, self.similarity) / self.temperature


def _new_rows(items, split, settings):
    """Returns the rows of users under which what is known of them is most likely, of all items.

    Formula: the row `u` with the largest `sum(log p(i | u))` over the items `i` that the user is known to have chosen,
    where `p` is the softmax over all items of `similarity(u, i) / temperature`.

    Args:
        items: `[num_items, embedding_dim]` float32, the trained embeddings.
        split: names the users.
        settings: those of the model.
    """
    known = split.matrix()
    users = np.arange(len(known))
    logits = CorpusLogits(ops.convert_to_tensor(items), settings.similarity, settings.new_rows.temperature)
    model = keras.Sequential([_table(len(known), settings), logits])
    rate = keras.optimizers.schedules.CosineDecay(settings.new_rows.learning_rate, settings.new_rows.steps)
    # The sum, so that the gradient of a row does not depend on the number of rows.
    model.compile(keras.optimizers.Adam(rate), keras.losses.CategoricalCrossentropy(True, reduction="sum"))
    shares = known / known.sum(axis=1, keepdims=True)
    model.fit(users, shares, batch_size=len(users), epochs=settings.new_rows.steps, verbose=0)
    return model.layers[0](users)


def _rng(split, seed):
    """Returns what draws the order of histories, or `None` if it is that of time."""
    return None if split.has_order else np.random.default_rng(seed)


def _features(split, seed, settings):
    train = split.train
    features = {}
    if "history" in settings.query:
        train, features["history"] = quality_data.histories(train, settings.max_length, _rng(split, seed))
    features |= {"user": train.users, "item": train.items}
    if settings.objective == "rating":
        features["rating"] = train.ratings
    if split.has_order and "history" in settings.query:
        # The first item of a user has nothing before it.
        rows = features["history"][:, -1] >= 0
        features = {name: values[rows] for name, values in features.items()}
    if "user" not in settings.query:
        del features["user"]
    return features


def _table(num_rows, settings):
    scale = keras.initializers.RandomUniform(-settings.initial_scale, settings.initial_scale)
    return keras.layers.Embedding(num_rows, settings.embedding_dim, embeddings_initializer=scale)


def _model(split, settings):
    train = split.train
    items, users = _table(train.num_items, settings), _table(train.num_users, settings)
    tower, features = users, "user"
    if "history" in settings.query:
        has_row = settings.query == "user+history"
        features = ["user", "history"] if has_row else "history"
        tower = HistoryTower(
            items,
            "history",
            encoder=settings.encoder,
            query_table=users if has_row else None,
            query_feature="user" if has_row else None,
            query_dropout=settings.query_dropout,
            dropout=settings.dropout,
            max_length=settings.max_length,
        )
    is_retrieval = settings.objective == "retrieval"
    counts = np.bincount(train.items, minlength=train.num_items)
    return TwoTowerModel(
        tower,
        items,
        query_features=features,
        candidate_features="item",
        label=None if is_retrieval else "rating",
        task=DistributedTwoTowerTask(
            similarity=settings.similarity,
            temperature=settings.temperature,
            remove_accidental_hits=is_retrieval,
        ),
        retrieval=shard_candidates(keras_rs.layers.BruteForceRetrieval(k=10), items, similarity=settings.similarity),
        sampling_probability=StreamingSamplingProbability(train.num_items, counts=counts) if is_retrieval else None,
        corpus_metrics=[],
    )


def _fit(model, features, settings):
    rate = settings.learning_rate
    if settings.decays:
        rate = keras.optimizers.schedules.CosineDecay(
            rate, settings.epochs * -(-len(features["item"]) // settings.batch_size)
        )
    if settings.optimizer == "adagrad":
        model.compile(keras.optimizers.Adagrad(rate))
    else:
        model.compile(keras.optimizers.Adam(rate, weight_decay=settings.weight_decay or None))
    model.fit(features, batch_size=settings.batch_size, epochs=settings.epochs, verbose=0)
