"""A two-tower model that cannot be built leaves Keras usable: models that are built next do not meet its error."""

import keras
import numpy as np
import pytest
from conftest import model_parallel

from keras_rs_contrib import ShardedEmbedding, TwoTowerModel

# Keras warns before it raises.
# Before 3.15, Keras raises a `RuntimeError` with the message of an error in a trace.
ERRORS = (ValueError, RuntimeError)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* looks like it has unbuilt state:UserWarning"),
    pytest.mark.filterwarnings("ignore:`build.*` was called on layer:UserWarning"),
]


class Traced(keras.Model):
    """A model whose layers Keras builds in a trace: it initializes their variables at the end."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = keras.layers.Embedding(10, 4), layer, keras.layers.Dense(1)

    def call(self, x):
        return self.last(keras.ops.concatenate([self.first(x), self.layer(x)], axis=-1))


def fit(model):
    model.compile("sgd", "mse")
    return np.asarray(model.fit(np.arange(8), np.ones((8, 1)), batch_size=8, verbose=0).history["loss"])


def assert_usable(*layers):
    """Builds models that have nothing to do with the failure, each in another way."""
    for layer in (keras.layers.Embedding(10, 4), *layers):
        assert np.isfinite(fit(Traced(layer))).all()
        assert Traced(layer)(np.arange(8)).shape == (8, 1)
    assert keras.layers.Dense(2)(np.ones((2, 3))).shape == (2, 2)


def layout(pattern, axes, shape=(2, 4)):
    keras.distribution.set_distribution(model_parallel(shape, pattern, axes))


def fails(shape, dtype=None):
    raise OSError("the file of initial values is missing")


def interrupted(shape, dtype=None):
    raise KeyboardInterrupt


FAILURES = [
    (fails, (OSError, *ERRORS), "the file of initial values is missing"),
    (interrupted, KeyboardInterrupt, None),
]

FEATURES = {"user": np.arange(16) % 9, "movie": np.arange(16) % 13}
USES = {
    "fit": lambda model: model.fit(FEATURES, verbose=0),
    "evaluate": lambda model: model.evaluate(FEATURES, verbose=0),
    "predict": lambda model: model.predict({"user": FEATURES["user"]}, verbose=0),
    "recommend": lambda model: model.recommend({"user": FEATURES["user"]}, k=2),
    "train_on_batch": lambda model: model.train_on_batch(FEATURES),
    "test_on_batch": lambda model: model.test_on_batch(FEATURES),
    "predict_on_batch": lambda model: model.predict_on_batch({"user": FEATURES["user"]}),
    "call": lambda model: model(FEATURES),
}


class Nested(keras.layers.Layer):
    """A tower that is not an embedding, but has one."""

    def __init__(self, *arguments, **kwargs):
        super().__init__()
        self.embedding = keras.layers.Embedding(*arguments, name="table", **kwargs)

    def call(self, ids):
        return self.embedding(ids)


def model_of(towers, check_inputs=True):
    model = TwoTowerModel(*towers, "user", "movie", check_inputs=check_inputs, name="model")
    model.compile("sgd")
    return model


@pytest.mark.parametrize(
    ("use", "check_inputs"),
    [*((use, True) for use in USES), ("fit", False), ("call", False)],
)
def test_a_plain_tower_whose_rows_do_not_divide_raises_before_anything_is_created(use, check_inputs):
    # The path of the tower within the model.
    layout("model/user/embeddings", ("model", None))
    model = model_of([keras.layers.Embedding(9, 4, name="user"), keras.layers.Embedding(13, 4)], check_inputs)
    with pytest.raises(ERRORS, match=r"(?s)9 rows of 'model/user/embeddings' for 4 devices.*ShardedEmbedding"):
        USES[use](model)
    assert model.query_tower.variables == []
    assert not model.query_tower.built
    assert_usable()
    # The advice works.
    other = model_of([ShardedEmbedding(9, 4, name="user"), keras.layers.Embedding(13, 4)], check_inputs)
    USES[use](other)
    assert np.isfinite(other.fit(FEATURES, verbose=0).history["loss"]).all()
    # And so does the tower, without the layout map.
    keras.distribution.set_distribution(None)
    USES[use](model_of([model.query_tower, keras.layers.Embedding(13, 4)], check_inputs))


@pytest.mark.parametrize("check_inputs", [False, True])
@pytest.mark.parametrize("use", ["fit", "train_on_batch", "test_on_batch", "call"])
def test_a_table_within_a_tower_whose_rows_do_not_divide_raises(use, check_inputs):
    layout(".*/table/embeddings", ("model", None))
    model = model_of([keras.layers.Embedding(9, 4), Nested(13, 4)], check_inputs)
    with pytest.raises(ERRORS, match=r"(?s)13 rows of '.*/table/embeddings' for 4 devices.*ShardedEmbedding"):
        USES[use](model)
    assert_usable()
    model = model_of([keras.layers.Embedding(9, 4), keras.layers.Embedding(13, 4, name="table")], check_inputs)
    assert_usable()


@pytest.mark.parametrize("check_inputs", [False, True])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("initializer", "error", "message"), FAILURES)
def test_a_plain_tower_whose_initializer_fails(use, check_inputs, initializer, error, message):
    towers = [keras.layers.Embedding(9, 4, initializer), keras.layers.Embedding(13, 4)]
    with pytest.raises(error, match=message):
        USES[use](model_of(towers, check_inputs))
    assert_usable()
    assert np.isfinite(
        model_of([keras.layers.Embedding(9, 4), towers[1]]).fit(FEATURES, verbose=0).history["loss"]
    ).all()


class Outer(keras.Model):
    """A model around a two-tower model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, features):
        return self.inner(features)["query_embeddings"]


def test_a_two_tower_model_within_another_model():
    layout(".*user/embeddings", ("model", None))
    model = Outer(model_of([keras.layers.Embedding(9, 4, name="user"), keras.layers.Embedding(13, 4)]))
    model.compile("sgd", "mse")
    with pytest.raises(ERRORS, match=r"(?s)9 rows of '.*user/embeddings' for 4 devices.*ShardedEmbedding"):
        model.fit(FEATURES, np.ones((16, 4)), verbose=0)
    assert_usable()
