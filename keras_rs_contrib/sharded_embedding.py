"""An embedding whose rows may be split over a mesh axis, whatever their number."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rs_contrib.padded_variable import PaddedVariable, add_table


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class ShardedEmbedding(keras.layers.Embedding):  # type: ignore[misc]
    """`keras.layers.Embedding` with rows split over one axis of the mesh in force.

    The rows need not divide over the axis: on the mesh they are rounded up, and the added ones are never looked up,
    trained, returned or saved. A file therefore loads on any mesh, and without one, optimizer state included. Only
    optimizers whose slots are not shaped as the table, such as Adafactor, need rows that divide.

    `embeddings.shape` and `embeddings.numpy()` are those of a plain embedding. `embeddings.value`, and so an operation
    on the table itself, such as a product with all its rows, has the added rows too: slice what it gives.

    Args:
        input_dim: as of `keras.layers.Embedding`, as the other arguments.
        output_dim: size of an embedding.
        mesh_axis: the axis of the mesh in force over which the rows are split. `None` follows the layout map of
            `keras.distribution.ModelParallel`. Without a distribution, or on a mesh without the axis, which a loaded
            model may meet, the table stays whole.
        **kwargs: arguments of `keras.layers.Embedding`.

    Example:
    ```python
    tower = ShardedEmbedding(1683, 32, mesh_axis="batch")
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    embeddings = tower(np.array([0, 1682]))
    ```
    """

    def __init__(self, input_dim: int, output_dim: int, mesh_axis: str | None = None, **kwargs: Any) -> None:
        weights = kwargs.pop("weights", None)
        super().__init__(input_dim, output_dim, **kwargs)
        self.mesh_axis = mesh_axis
        if weights is not None:
            self.build()
            self.set_weights(weights if isinstance(weights, list) else [weights])

    def add_weight(self, *args: Any, shape: Any = None, name: str | None = None, **kwargs: Any) -> keras.Variable:
        """Adds a weight, as in `keras.layers.Layer`, and lays it out if it is the table."""
        if name != "embeddings":
            return super().add_weight(*args, shape=shape, name=name, **kwargs)
        initializer = kwargs.pop("initializer")
        return add_table(
            super().add_weight, f"{self.path}/{name}", shape, initializer, self.mesh_axis, name=name, **kwargs
        )

    def call(self, inputs: Any) -> Any:
        """Returns the embeddings of `inputs`, integers in `[0, input_dim)`."""
        if isinstance(self._embeddings, PaddedVariable):
            # An id that is out of range must be so here, too, and a negative one counts from the last row shown.
            inputs = ops.cast(inputs, "int32")
            inputs = ops.where(ops.less(inputs, 0), ops.add(inputs, self.input_dim), inputs)
            in_range = ops.logical_and(ops.greater_equal(inputs, 0), ops.less(inputs, self.input_dim))
            inputs = ops.where(in_range, inputs, self._embeddings.num_rows_on_mesh)
        return super().call(inputs)

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> None:
        """Adds a low-rank update to the table, whose rows must divide."""
        if isinstance(self._embeddings, PaddedVariable):
            raise ValueError(
                "LoRA needs a table whose rows divide over the mesh axis that splits them. Received: "
                f"{self.input_dim} rows, {self._embeddings.num_rows_on_mesh} on the mesh. "
                f"Round `input_dim` up to {self._embeddings.num_rows_on_mesh}."
            )
        super().enable_lora(rank, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "mesh_axis": self.mesh_axis}


def shard(embedding: keras.layers.Embedding, mesh_axis: str | None) -> None:
    """Makes a plain embedding that is not built yet a `ShardedEmbedding`, where it lies.

    Args:
        embedding: a layer whose class is `keras.layers.Embedding` itself.
        mesh_axis: see `ShardedEmbedding`.
    """
    assert type(embedding) is keras.layers.Embedding
    assert not embedding.built
    embedding.__class__ = ShardedEmbedding
    embedding.mesh_axis = mesh_axis
