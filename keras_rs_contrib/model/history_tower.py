"""A query tower that embeds what a user did last, by the table of the candidates."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import keras
from keras import ops

from keras_rs_contrib.arguments import check_type, explains_keywords, positive_int
from keras_rs_contrib.ids import NO_CANDIDATE
from keras_rs_contrib.model.feature_names import flat
from keras_rs_contrib.model.history_encoders import SelfAttentionEncoder

ENCODERS = ("mean", "gru", "attention")


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class HistoryTower(keras.layers.Layer):  # type: ignore[misc]
    """A query tower over the most recent candidates of each user, which also serves users that it has not seen before.

    It looks up the history in the table of the candidate tower, and encodes it as one embedding. Both towers train the
    table, which is saved once. With a `query_table`, the tower adds the user's own row to the encoded history.

    A history is a row of ids, with the most recent one in the last column. -1 is padding, in any column. A history
    without ids is encoded as zeros. Batches may have any number of columns, also none. Of a longer history, only the
    last `max_length` ids count.

    Args:
        candidate_table: the `keras.layers.Embedding`, `ShardedEmbedding` or `RowSparseEmbedding` that is the candidate
            tower, or is a part of it.
        history_feature: name of the feature with histories, `[batch, length]` ints.
        encoder: `"mean"` of the embeddings; `"gru"` for the last state of a `keras.layers.GRU`; `"attention"` for
            causal self-attention, as in SASRec; or a Keras layer that maps `[batch, length, dim]` to `[batch, dim]`.
            If its `call` has an argument `mask`, the layer receives a `[batch, length]` bool mask. In each row, at
            least one step is not masked. Masked steps are zeros.
        query_table: an embedding whose rows are users, or `None` for histories alone.
        query_feature: name of the feature with its ids, `[batch]` or `[batch, 1]` ints.
        query_dropout: in [0, 1), the probability that a row of `query_table` is left out in training, so that a history
            alone also gives a good embedding, as it does for a new user. Rows that stay are divided by
            `1 - query_dropout`.
        mask_zero: whether id 0 means unknown: it is padding in a history, and a query with id 0 has no row. Row 0 of a
            `Vocabulary` is such an id.
        max_length: positive int, the largest number of ids that count.
        num_blocks: positive int, the number of blocks of `"attention"`. By default 1.
        num_heads: positive int, the number of heads of `"attention"`, which divides the dimension. By default 1.
        dropout: in [0, 1), the probability of dropping an element of an embedding of the history in training. In
            `"attention"`, also an attention weight, or an element of what a block adds.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, has no effect, or does not fit the others.

    Example:
    ```python
    movies = keras.layers.Embedding(50, 16)
    tower = HistoryTower(movies, "history", encoder="gru")
    model = TwoTowerModel(tower, movies, query_features="history", candidate_features="movie_id")
    model.compile("adam")
    history = np.array([[-1, 3, 7], [4, 3, 9]])  # the most recent ones are 7 and 9
    model.fit({"history": history, "movie_id": np.array([5, 6])}, verbose=0)
    ids, scores = model.recommend({"history": history}, k=3)
    ```

    References:
        - Mean and own row: Y. Koren, "Factorization meets the neighborhood", KDD 2008 (SVD++), with a plain mean.
        - GRU: B. Hidasi et al., "Session-based recommendations with recurrent neural networks", ICLR 2016.
        - Attention: W.-C. Kang and J. McAuley, "Self-attentive sequential recommendation", ICDM 2018.
    """

    @explains_keywords
    def __init__(
        self,
        candidate_table: keras.layers.Embedding,
        history_feature: str,
        *,
        encoder: str | keras.layers.Layer = "mean",
        query_table: keras.layers.Embedding | None = None,
        query_feature: str | None = None,
        query_dropout: float = 0.0,
        mask_zero: bool = False,
        max_length: int = 50,
        num_blocks: int | None = None,
        num_heads: int | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_type("candidate_table", candidate_table, keras.layers.Embedding)
        check_type("history_feature", history_feature, str)
        check_type("query_table", query_table, keras.layers.Embedding, optional=True)
        check_type("query_feature", query_feature, str, optional=True)
        check_type("mask_zero", mask_zero, bool)
        max_length = positive_int(max_length, "max_length")
        dropout, query_dropout = _rate(dropout, "dropout"), _rate(query_dropout, "query_dropout")
        dim = candidate_table.output_dim
        _check_query(query_table, query_feature, query_dropout, history_feature, dim)
        sizes = _attention_sizes(encoder, num_blocks, num_heads, dim)
        # Autocast would round ids that come as floats, before the error about them.
        super().__init__(**{"autocast": False, **kwargs})
        self.candidate_table = candidate_table
        self.history_feature = history_feature
        self.query_table = query_table
        self.query_feature = query_feature
        self.query_dropout = query_dropout
        self.mask_zero = mask_zero
        self.max_length = max_length
        self.num_blocks, self.num_heads = num_blocks, num_heads
        self.dropout = dropout
        self.encoder_name = encoder if isinstance(encoder, str) else None
        policy = {"dtype": self.dtype_policy}
        self.encoder: Any = encoder
        if encoder == "mean":
            self.encoder = keras.layers.GlobalAveragePooling1D(name="mean", **policy)
        elif encoder == "gru":
            self.encoder = keras.layers.GRU(dim, name="gru", **policy)
        elif encoder == "attention":
            self.encoder = SelfAttentionEncoder(max_length, *sizes, dropout, name="attention", **policy)
        self.drop = keras.layers.Dropout(dropout, **policy)
        self.drop_query = keras.layers.Dropout(query_dropout, noise_shape=(None, 1), **policy)

    def build(self, input_shape: Any) -> None:
        """Builds the tables and the encoder."""
        for table in (self.candidate_table, self.query_table):
            if table is not None and not table.built:
                table.build()
        if self.encoder.built:
            return
        shape = self._history_shape(input_shape)
        length = None if shape[-1] is None else min(max(shape[-1], 1), self.max_length)
        # A call also builds the layers that a layer of one's own builds in its first call.
        embeddings = keras.KerasTensor((None, length, self.candidate_table.output_dim), self.compute_dtype)
        self._encode(embeddings, keras.KerasTensor((None, length), "bool"), None)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns the embeddings of queries, `[batch, embedding_dim]`.

        Args:
            inputs: a dict of features, or the histories if they are the only feature.
            training: whether to drop elements.

        Raises:
            TypeError: if histories are not integers.
            ValueError: if a feature is missing, or has the wrong number of axes.
        """
        history, query_ids = self._features(inputs)
        history, is_item = self._most_recent(history)
        embeddings = self.candidate_table(ops.where(is_item, history, 0))
        embeddings = ops.where(ops.expand_dims(is_item, 2), ops.cast(embeddings, self.compute_dtype), 0.0)
        has_items = ops.any(is_item, axis=1, keepdims=True)
        # Encoders divide by the number of steps, or normalize over them: a step of zeros replaces an empty history.
        is_last = ops.equal(ops.arange(history.shape[1]), history.shape[1] - 1)
        mask = ops.logical_or(is_item, ops.logical_and(ops.logical_not(has_items), is_last))
        encoded = self._encode(self.drop(embeddings, training=training), mask, training)
        outputs = ops.where(has_items, ops.cast(encoded, self.compute_dtype), 0.0)
        if self.query_table is None:
            return outputs
        rows = ops.cast(self.query_table(query_ids), self.compute_dtype)
        if self.mask_zero:
            rows = ops.where(ops.expand_dims(ops.equal(query_ids, 0), 1), 0.0, rows)
        return ops.add(outputs, self.drop_query(rows, training=training))

    def _features(self, inputs: Any) -> tuple[Any, Any]:
        """Returns the histories and the ids of the queries, which are `None` without a `query_table`."""
        names = [name for name in (self.history_feature, self.query_feature) if name is not None]
        if not isinstance(inputs, dict):
            if self.query_feature is not None:
                raise ValueError(
                    f"A `HistoryTower` with a `query_table` takes a dict with the features {names}. Received: one "
                    f"tensor. Pass `query_features={names}` to the model."
                )
            inputs = {self.history_feature: inputs}
        missing = [name for name in names if name not in inputs]
        if missing:
            raise ValueError(
                f"A `HistoryTower` needs the features {names}. Received: {sorted(inputs)}, without {missing[0]!r}. "
                f"Pass `query_features={names}` to the model."
            )
        history = ops.convert_to_tensor(inputs[self.history_feature])
        if not keras.backend.is_int_dtype(history.dtype):
            raise TypeError(
                f"The feature {self.history_feature!r} must hold ids, as integers. Received: dtype "
                f"{keras.backend.standardize_dtype(history.dtype)}. Convert it: `.astype('int32')`; or begin the model "
                'with `keras.Input((None,), dtype="int32")`.'
            )
        if len(history.shape) != 2:
            raise ValueError(
                f"The feature {self.history_feature!r} must hold a row of ids for each query, `[batch, length]`, "
                f"padded with -1. Received: shape {tuple(history.shape)}. For one query, pass a list in a list."
            )
        query_ids = None if self.query_feature is None else flat(ops.convert_to_tensor(inputs[self.query_feature]))
        if query_ids is not None and len(query_ids.shape) != 1:
            raise ValueError(
                f"The feature {self.query_feature!r} must hold one id for each query, `[batch]` or `[batch, 1]`. "
                f"Received: shape {tuple(query_ids.shape)}. Pass ids of candidates as the history."
            )
        return ops.cast(history, "int32"), query_ids

    def _most_recent(self, history: Any) -> tuple[Any, Any]:
        """Returns the most recent ids, `[batch, 1 to max_length]` int32, and which of them are not padding."""
        length = history.shape[1]
        if length == 0:
            history = ops.pad(history, [[0, 0], [1, 0]], constant_values=NO_CANDIDATE)
        elif length > self.max_length:
            # Unique keys, because not every backend sorts stably.
            keys = ops.add(ops.arange(length), ops.where(self._is_item(history), length, 0))
            order = ops.argsort(keys, axis=1)[:, -self.max_length :]
            history = ops.take_along_axis(history, order, axis=1)
        return history, self._is_item(history)

    def _is_item(self, history: Any) -> Any:
        is_item = ops.not_equal(history, NO_CANDIDATE)
        return ops.logical_and(is_item, ops.not_equal(history, 0)) if self.mask_zero else is_item

    def _encode(self, embeddings: Any, mask: Any, training: bool | None) -> Any:
        """Returns encoded histories, `[batch, dim]`."""
        parameters = inspect.signature(self.encoder.call).parameters
        arguments = {"mask": mask, "training": training}
        with warnings.catch_warnings():
            # Keras says so of every functional model, although it passes the mask on to its layers.
            name = re.escape(self.encoder.name)
            warnings.filterwarnings("ignore", f"Layer '{name}' .* was passed an input with a mask", UserWarning)
            encoded = self.encoder(embeddings, **{name: arguments[name] for name in arguments if name in parameters})
        expected = (embeddings.shape[0], self.candidate_table.output_dim)
        if tuple(getattr(encoded, "shape", ())) != expected:
            raise ValueError(
                f"`encoder` must return one embedding for each history, of shape {expected}. Received: "
                f"{getattr(encoded, 'shape', type(encoded).__name__)} from {self.encoder.name!r}. "
                "Let it pool over the steps, and end in a layer with `embedding_dim` units."
            )
        return encoded

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns `(batch, embedding_dim)`."""
        return (self._history_shape(input_shape)[0], self.candidate_table.output_dim)

    def _history_shape(self, input_shape: Any) -> Any:
        # The error about a missing feature is that of `call`.
        return input_shape.get(self.history_feature, (None, None)) if isinstance(input_shape, dict) else input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized."""
        serialize = keras.saving.serialize_keras_object
        names = ("history_feature", "query_feature", "query_dropout", "mask_zero", "max_length")
        return {
            **super().get_config(),
            "candidate_table": serialize(self.candidate_table),
            "encoder": serialize(self.encoder) if self.encoder_name is None else self.encoder_name,
            "query_table": None if self.query_table is None else serialize(self.query_table),
            **{name: getattr(self, name) for name in (*names, "num_blocks", "num_heads", "dropout")},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HistoryTower:
        """Returns the tower that `get_config` describes."""
        deserialize = keras.saving.deserialize_keras_object
        names = ("candidate_table", "encoder", "query_table")
        return cls(**{name: deserialize(value) if name in names else value for name, value in config.items()})


def _rate(value: Any, name: str) -> float:
    """Returns a probability as a float, or raises `ValueError` if it is not in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={value!r}. Pass 0 to drop nothing.")
    return float(value)


def _check_query(
    table: keras.layers.Embedding | None, feature: str | None, rate: float, history_feature: str, dim: int
) -> None:
    """Raises `ValueError` if the arguments of the query's own row do not fit each other, or the candidates."""
    if (table is None) != (feature is None):
        given, missing = ("query_feature", "query_table") if table is None else ("query_table", "query_feature")
        raise ValueError(
            "`query_table` and `query_feature` belong together. Received: "
            f"`{given}` without `{missing}`. Pass both, or neither."
        )
    if table is None:
        if rate:
            raise ValueError(
                f"`query_dropout` leaves out rows of `query_table`. Received: query_dropout={rate} without a "
                "`query_table`. Pass one, or leave out `query_dropout`."
            )
        return
    if feature == history_feature:
        raise ValueError(
            f"`query_feature` and `history_feature` must be two features. Received: {feature!r} for both. "
            "Name the feature with one id for each query."
        )
    if table.output_dim != dim:
        raise ValueError(
            "`query_table` and `candidate_table` must have the same `output_dim`. Received: "
            f"{table.output_dim} and {dim}. Their embeddings are added."
        )


def _attention_sizes(encoder: Any, num_blocks: int | None, num_heads: int | None, dim: int) -> tuple[int, int]:
    """Returns the numbers of blocks and heads, or raises an error if the encoder does not have them."""
    if not isinstance(encoder, keras.layers.Layer) and encoder not in ENCODERS:
        raise ValueError(
            f"`encoder` must be a Keras layer, or one of {list(ENCODERS)}. Received: {encoder!r}. "
            "Pass one of these names, or an instance of a layer."
        )
    sizes = {"num_blocks": num_blocks, "num_heads": num_heads}
    for name, value in sizes.items():
        if value is not None and encoder != "attention":
            raise ValueError(
                f'`{name}` is an argument of `encoder="attention"`. Received: {name}={value!r} for {encoder!r}. '
                f"Leave out `{name}`, or change the encoder."
            )
    blocks, heads = (positive_int(1 if value is None else value, name) for name, value in sizes.items())
    if dim % heads:
        raise ValueError(
            "`num_heads` must divide the dimension of the embeddings. Received: "
            f"num_heads={heads} for {dim} dimensions. Change one of them."
        )
    return blocks, heads
