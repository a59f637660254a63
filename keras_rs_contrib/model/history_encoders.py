"""Self-attention over the steps of a history."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class SelfAttentionEncoder(keras.layers.Layer):  # type: ignore[misc]
    """Causal self-attention over the steps of a sequence. Returns the output for the last step that is not masked.

    Learned vectors of positions, which count from the last step back and leave out masked steps, are added to the
    input. Each step attends to itself and to earlier steps. The output is normalized.

    Args:
        max_length: positive int, the largest number of steps.
        num_blocks: positive int, the number of blocks.
        num_heads: positive int, a divisor of `dim`.
        dropout: in [0, 1), the probability of dropping an attention weight, or an element of what a block adds.
        **kwargs: arguments of `keras.layers.Layer`.

    Reference: W.-C. Kang and J. McAuley, "Self-attentive sequential recommendation", ICDM 2018.
    """

    def __init__(
        self, max_length: int, num_blocks: int = 1, num_heads: int = 1, dropout: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.max_length = max_length
        self.num_blocks = num_blocks
        self.num_heads = num_heads
        self.dropout = dropout
        self.blocks = [SelfAttentionBlock(num_heads, dropout, dtype=self.dtype_policy) for _ in range(num_blocks)]
        self.norm = keras.layers.LayerNormalization(dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        """Creates the positions, and builds the blocks."""
        self.positions = self.add_weight(
            shape=(self.max_length, input_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="positions",
        )
        for layer in (*self.blocks, self.norm):
            layer.build(input_shape)

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        """Returns the output for the last step that is not masked, `[batch, dim]`.

        Args:
            inputs: `[batch, length, dim]` float.
            mask: `[batch, length]` bool, with True in each row, or `None` for no masked steps.
            training: whether to drop elements.
        """
        if mask is None:
            mask = ops.ones(ops.shape(inputs)[:2], dtype="bool")
        if inputs.shape[1] == 1:
            # Keras warns of a softmax over one step.
            inputs, mask = ops.pad(inputs, [[0, 0], [1, 0], [0, 0]]), ops.pad(mask, [[0, 0], [1, 0]])
        counts = ops.flip(ops.cumsum(ops.flip(ops.cast(mask, "int32"), axis=1), axis=1), axis=1)
        positions = ops.maximum(ops.subtract(counts, 1), 0)
        x = ops.add(inputs, ops.take(self.positions, positions, axis=0))
        steps = ops.arange(inputs.shape[1])
        is_earlier = ops.less(ops.expand_dims(steps, 0), ops.expand_dims(steps, 1))
        is_same = ops.equal(ops.expand_dims(steps, 0), ops.expand_dims(steps, 1))
        # A masked step also attends to itself, so that no softmax is over nothing.
        attended = ops.logical_or(ops.logical_and(is_earlier, ops.expand_dims(mask, 1)), is_same)
        for block in self.blocks[:-1]:
            x = block(x, x, attended, training=training)
        # Nothing reads the outputs of the last block for other steps.
        is_last = ops.expand_dims(ops.logical_and(mask, ops.equal(positions, 0)), 1)
        last = ops.matmul(ops.cast(is_last, x.dtype), x)
        x = self.blocks[-1](last, x, ops.expand_dims(mask, 1), training=training)
        return ops.squeeze(self.norm(x), axis=1)

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        """Returns `None`: the output has no steps."""

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """Returns `(batch, dim)`."""
        return (input_shape[0], input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        names = ("max_length", "num_blocks", "num_heads", "dropout")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class SelfAttentionBlock(keras.layers.Layer):  # type: ignore[misc]
    """A block: `y = x + attention(norm(x))`, and then `y + dense(relu(dense(norm(y))))`, each sum with dropout.

    Args:
        num_heads: positive int, the number of heads, a divisor of `dim`.
        dropout: in [0, 1), the probability of dropping an attention weight, or an element of what is added.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(self, num_heads: int, dropout: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = keras.layers.LayerNormalization(dtype=self.dtype_policy)
        self.dense_norm = keras.layers.LayerNormalization(dtype=self.dtype_policy)
        self.drop = keras.layers.Dropout(dropout, dtype=self.dtype_policy)

    def build(self, input_shape: Any) -> None:
        """Creates the layers whose sizes depend on `dim`."""
        dim = input_shape[-1]
        self.attention = keras.layers.MultiHeadAttention(
            self.num_heads, dim // self.num_heads, dropout=self.dropout, dtype=self.dtype_policy
        )
        self.inner = keras.layers.Dense(dim, activation="relu", dtype=self.dtype_policy)
        self.outer = keras.layers.Dense(dim, dtype=self.dtype_policy)
        self.attention.build(input_shape, input_shape)
        for layer in (self.attention_norm, self.dense_norm, self.inner, self.outer):
            layer.build(input_shape)

    def call(self, queries: Any, steps: Any, attended: Any, training: bool | None = None) -> Any:
        """Returns the outputs for the steps in `queries`, `[batch, num_queries, dim]`.

        Args:
            queries: `[batch, num_queries, dim]` float, some of the steps or all.
            steps: `[batch, length, dim]` float.
            attended: `[batch, num_queries, length]` bool, which steps each query attends to.
            training: whether to drop elements.
        """
        keys = self.attention_norm(steps)
        normal = keys if queries is steps else self.attention_norm(queries)
        added = self.attention(normal, keys, attention_mask=attended, training=training)
        x = ops.add(queries, self.drop(added, training=training))
        added = self.outer(self.inner(self.dense_norm(x)))
        return ops.add(x, self.drop(added, training=training))

    def compute_output_shape(self, queries_shape: Any, steps_shape: Any = None, attended_shape: Any = None) -> Any:
        """Returns the shape of the queries."""
        return queries_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "num_heads": self.num_heads, "dropout": self.dropout}
