"""Models that leave Keras usable if they cannot be built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_rs_contrib import _keras
from keras_rs_contrib.tables.layout import axis_of_rows, check_layouts, check_rows_divide
from keras_rs_contrib.tables.sharded_embedding import ShardedEmbedding


class RecoveringModel(_keras.LossPerExample):
    """A model whose failure to build does not reach other models.

    Keras builds a model in a trace, at whose end it initializes the variables. If that fails, it would try them again,
    and fail, whenever it builds another model.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model. Layers that are not built yet are checked first."""
        if all(layer.built for layer in _keras.sublayers(self)):
            return super().__call__(*args, **kwargs)
        self._check_plain_embeddings()
        with _recovering(self):
            outputs = super().__call__(*args, **kwargs)
            # If the trace is not over yet, Keras has not laid out the variables.
            check_layouts(_uninitialized(self))
            return outputs

    # The entry points at which Keras builds a model.

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the model: see `keras.Model.fit`."""
        with _recovering(self):
            return super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the model: see `keras.Model.evaluate`."""
        with _recovering(self):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts batches: see `keras.Model.predict`."""
        with _recovering(self):
            return super().predict(*args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Trains on one batch: see `keras.Model.train_on_batch`."""
        with _recovering(self):
            return super().train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates one batch: see `keras.Model.test_on_batch`."""
        with _recovering(self):
            return super().test_on_batch(*args, **kwargs)

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts one batch: see `keras.Model.predict_on_batch`."""
        with _recovering(self):
            return super().predict_on_batch(*args, **kwargs)

    def _check_plain_embeddings(self) -> None:
        """Raises `ValueError` if the layout map splits the rows of a plain embedding unevenly."""
        for layer in _keras.sublayers(self):
            is_plain = isinstance(layer, keras.layers.Embedding) and not isinstance(layer, ShardedEmbedding)
            if is_plain and not layer.built:
                # The path that a tower will have. For embeddings within towers, `check_layouts` knows the path.
                path = f"{self.path or self.name}/{layer.name}/embeddings"
                check_rows_divide(layer.input_dim, axis_of_rows(None, path), path)


@contextlib.contextmanager
def _recovering(model: keras.Model) -> Iterator[None]:
    """If the model cannot be built, makes Keras forget its variables, and explains layouts that do not fit."""
    try:
        yield
    except BaseException as error:
        variables = _uninitialized(model)
        _keras.forget_uninitialized_variables(variables)
        try:
            check_layouts(variables)
        except ValueError as explanation:
            raise explanation from error
        raise


def _uninitialized(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables that Keras is to initialize: those of the model, and after a trace all that are left."""
    variables = _keras.uninitialized_variables()
    if not _keras.is_in_stateless_scope():
        return variables
    ids = {id(variable) for variable in model.variables}
    return [variable for variable in variables if id(variable) in ids]
