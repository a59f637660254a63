"""An embedding whose rows can be split over a mesh axis, for any number of rows."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import explains_keywords, positive_int
from keras_rs_contrib.distribution import check_layout
from keras_rs_contrib.tables.dtypes import check_policy, quantization_message
from keras_rs_contrib.tables.padding import (
    DEFAULT_ROW_MULTIPLE,
    UnpaddedStore,
    add_table,
    check_table_layout,
    pad_rows,
    padded_rows,
)

# Weights with one row for each id.
TABLES = ("embeddings", "lora_embeddings_a")
MAX_ROWS = 2**31 - 1


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class ShardedEmbedding(keras.layers.Embedding):  # type: ignore[misc]
    """A `keras.layers.Embedding` whose rows are split over one axis of the mesh in force.

    JAX splits an array only if its size is divisible by the number of devices. The table therefore has padding rows. It
    has `ceil(input_dim / row_multiple) * row_multiple` rows on every mesh and on a single device, so optimizer slots
    have the same shape everywhere. Padding rows are zeros. They are never looked up, trained, retrieved or saved. A
    file loads on any mesh, with its optimizer state. A plain `keras.layers.Embedding` can load it, and vice versa.

    Optimizer slots include the padding rows, in files too: their state loads with the same `row_multiple` only. For
    another one, for a plain `keras.layers.Embedding`, and for files of version 0.1 whose model creates this layer in
    its constructor, call `load_weights` before `compile`; the latter also load with `row_multiple=1`. Optimizers that
    average over the whole table, such as Adafactor, count the padding rows.

    `embeddings.shape` and `get_weights()` include the padding rows. Use `embeddings[:input_dim]` in operations on the
    whole table.

    Args:
        input_dim: positive int, the number of ids.
        output_dim: positive int, the size of an embedding.
        mesh_axis: axis of the mesh in force that splits the rows. `None` follows the layout map of
            `keras.distribution.ModelParallel`. Without a distribution, or if a model is loaded on a mesh without this
            axis, each device holds the whole table.
        row_multiple: positive int, divisible by the number of devices along `mesh_axis`. The default is divisible by
            1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96 and 192. Pass 1 for no padding.
        **kwargs: other arguments of `keras.layers.Embedding`. The table cannot be quantized.

    Raises:
        ValueError: if an argument is out of range or not supported. `build` raises it if the number of padded rows is
            not divisible by the size of the mesh axis.

    Example:
    ```python
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    tower = ShardedEmbedding(1683, 32, mesh_axis="batch")
    embeddings = tower(np.array([0, 1682]))
    ```
    """

    # Declared for type checkers: Keras is not typed.
    trainable: bool
    # Whether a row optimizer trains the table, in float32.
    is_trained_by_row = False

    @explains_keywords
    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        mesh_axis: str | None = None,
        row_multiple: int = DEFAULT_ROW_MULTIPLE,
        **kwargs: Any,
    ) -> None:
        row_multiple = positive_int(row_multiple, "row_multiple")
        weights = kwargs.pop("weights", None)
        super().__init__(input_dim, output_dim, **kwargs)
        self._check_policy(self.dtype_policy)
        if self.quantization_config is not None:
            raise ValueError(quantization_message(self, "`quantization_config`"))
        if padded_rows(input_dim, row_multiple) > MAX_ROWS:
            raise ValueError(
                f"A table must have at most {MAX_ROWS} rows, including padding, because ids are int32. Received: "
                f"input_dim={input_dim} and row_multiple={row_multiple}. Hash the ids into fewer rows."
            )
        self.mesh_axis = mesh_axis
        self.row_multiple = row_multiple
        self._assign_weights(weights)

    def _assign_weights(self, weights: Any) -> None:
        """Builds the layer with the given table. Does nothing if `weights` is `None`."""
        if weights is None:
            return
        table = weights[0] if isinstance(weights, list) and len(weights) == 1 else weights
        shape = (self.input_dim, self.output_dim)
        if tuple(np.shape(table)) != shape:
            raise ValueError(
                f"`weights` must have shape {shape}, one row for each id. "
                f"Received: shape {tuple(np.shape(table))}. Pass the table without padding rows."
            )
        self.build()
        # With `lora_rank`, `embeddings` is a sum.
        variable = next(weight for weight in self.weights if weight.name == "embeddings")
        variable.assign(pad_rows(table, self.num_padded_rows))

    @property
    def num_padded_rows(self) -> int:
        """The number of rows of the table, including padding."""
        return padded_rows(self.input_dim, self.row_multiple)

    @property
    def dtype_policy(self) -> Any:
        """The dtype policy. A quantized one is an error."""
        return super().dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, policy: Any) -> None:
        self._check_policy(keras.dtype_policies.get(policy))
        keras.layers.Embedding.dtype_policy.fset(self, policy)

    def _check_policy(self, policy: Any) -> None:
        check_policy(self, policy, self.is_trained_by_row)

    def build(self, input_shape: Any = None) -> None:
        """Creates the table."""
        # Again: a policy map knows the layer by its path.
        self._check_policy(self.dtype_policy)
        if self.lora_rank:
            self._check_lora(self.lora_rank)
        super().build(input_shape)
        self._freeze_new_weights()

    def enable_lora(self, rank: int, lora_alpha: float | None = None, **kwargs: Any) -> None:
        """Adds a low-rank update to the table: see `keras.layers.Embedding`.

        Args:
            rank: positive int, the rank of the update.
            lora_alpha: the update is multiplied by `lora_alpha / rank`. By default, the `lora_alpha` of the
                constructor, or `rank` if it has none.
            **kwargs: other arguments of `keras.layers.Embedding.enable_lora`.

        Raises:
            ValueError: if the layer is not built, has a constraint, or already has such an update.
        """
        if not self.built:
            raise ValueError(
                "A layer must be built before LoRA is enabled. Received: `enable_lora` of "
                f"{self.name!r}, which has no table yet. Call `build()` first, or pass `lora_rank` to the constructor."
            )
        self._check_lora(rank)
        super().enable_lora(rank, self.lora_alpha if lora_alpha is None else lora_alpha, **kwargs)
        self._freeze_new_weights()

    def _check_lora(self, rank: Any) -> None:
        """Raises `ValueError` if LoRA cannot be enabled. In `build`, Keras would leave the layer without it."""
        rank = positive_int(rank, "rank")
        if self.embeddings_constraint is not None:
            raise ValueError(
                "LoRA adds to a table, which therefore must not have a constraint. Received: LoRA for "
                f"{self.name!r} with {self.embeddings_constraint!r}. Leave out `embeddings_constraint`, or LoRA."
            )
        path = self.path or self.name
        shape = (self.num_padded_rows, rank)
        check_table_layout(shape, self.row_multiple, self.mesh_axis, f"{path}/lora_embeddings_a")
        check_layout(f"{path}/lora_embeddings_b", (rank, self.output_dim))

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Raises `NotImplementedError`: `keras.Model.quantize` warns and leaves the layer as it is."""
        raise NotImplementedError(quantization_message(self, "a call of `quantize`"))

    def _freeze_new_weights(self) -> None:
        # Keras freezes weights in `add_weight`, which tables bypass, and when `trainable` is set.
        if not self.trainable:
            self.trainable = False

    def add_weight(self, *args: Any, shape: Any = None, name: str | None = None, **kwargs: Any) -> keras.Variable:
        """Adds a weight, as in `keras.layers.Layer`. A weight with one row for each id is padded and laid out."""
        if name not in TABLES:
            return super().add_weight(*args, shape=shape, name=name, **kwargs)
        return self._add_table(name, shape, **kwargs)

    def _add_table(self, name: str, shape: tuple[int, int], **kwargs: Any) -> keras.Variable:
        kwargs = {"row_multiple": self.row_multiple, "mesh_axis": self.mesh_axis, **kwargs}
        return add_table(self, name, shape, **kwargs)

    def call(self, inputs: Any) -> Any:
        """Returns the embeddings of `inputs`, integers in `[0, input_dim)`, as a dense or sparse tensor."""
        inputs = dense_ids(inputs)
        if self.num_padded_rows != self.input_dim:
            # As in a plain embedding, negative ids count from the last row without padding. Ids of padding rows are out
            # of range.
            inputs = ops.cast(inputs, "int32")
            inputs = ops.where(ops.less(inputs, 0), ops.add(inputs, self.input_dim), inputs)
            in_range = ops.logical_and(ops.greater_equal(inputs, 0), ops.less(inputs, self.input_dim))
            inputs = ops.where(in_range, inputs, self.num_padded_rows)
        return super().call(inputs)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Returns which ids are not 0, if `mask_zero`."""
        return super().compute_mask(dense_ids(inputs), mask)

    def save_own_variables(self, store: Any) -> None:
        """Saves the weights as a plain `keras.layers.Embedding` does, without padding rows."""
        super().save_own_variables(self._unpadded(store))

    def load_own_variables(self, store: Any) -> None:
        """Loads the saved weights of a `ShardedEmbedding` or a plain `keras.layers.Embedding`."""
        super().load_own_variables(self._unpadded(store))

    def _unpadded(self, store: Any) -> UnpaddedStore:
        return UnpaddedStore(store, self.input_dim, self.num_padded_rows, self.name)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "mesh_axis": self.mesh_axis, "row_multiple": self.row_multiple}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ShardedEmbedding:
        """Creates a layer from its config."""
        # Files of version 0.1 have no `row_multiple`: their tables and optimizer slots have no padding.
        embedding: ShardedEmbedding = super().from_config({"row_multiple": 1, **config})
        return embedding


def dense_ids(ids: Any) -> Any:
    """Returns ids as a dense tensor. As in a plain embedding, a sparse tensor has id 0 where it stores no value."""
    if isinstance(ids, keras.KerasTensor):
        # Keras converts sparse tensors where it adds a number to them.
        return ops.add(ids, 0) if ids.sparse else ids
    return ops.convert_to_tensor(ids, sparse=False)
