"""An embedding whose training step costs what the batch costs, however large the table."""

from __future__ import annotations

import math
import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib import row_optimizers, row_sparse_variable, row_update
from keras_rs_contrib.distribution import axis_of_rows, table_layout
from keras_rs_contrib.padded_variable import add_table
from keras_rs_contrib.sharded_embedding import ShardedEmbedding


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RowSparseEmbedding(ShardedEmbedding):
    """`keras.layers.Embedding` that trains only the rows of the batch, by an optimizer of its own.

    A plain embedding has a gradient as large as the table, and its optimizer goes over all rows in each step. Here a
    step reads and writes the rows that are in the batch, in place: the same batch takes as long in a table of a million
    rows as in one of a thousand. The layer works within `fit` and with any Keras optimizer, which trains the other
    weights of the model and leaves this layer's alone; so weight decay, clipping and the learning rate of `compile` are
    not those of the rows.

    What the optimizer keeps for each row are weights of the layer: they are saved and restored with it. They count as
    trainable weights, since Keras's optimizers overwrite these, and no others, with what a step computes.

    The table must be looked up once in each training step. Two lookups are an error: join them, by `lookup_together`.
    So is a gradient of the table that comes from elsewhere, or an optimizer that accumulates or scales gradients or
    averages weights. `jax.grad`, taken by hand, gives the table after the step, and likewise what is kept for its rows
    (0 where the loss does not depend on a lookup): assign them, and apply the gradients of the rest, or let an
    optimizer do both. The number of steps is one of the non-trainable weights that a stateless call returns.

    Out-of-range ids give NaN, as in a plain embedding; a batch with such an id changes no row.

    Args:
        input_dim: as of `keras.layers.Embedding`, as the other arguments.
        output_dim: size of an embedding.
        optimizer: `"adagrad"`, `"sgd"`, `"rowwise_adagrad"`, `"lazy_adam"`; a `RowAdagrad`, `RowSGD`, `RowWiseAdagrad`
            or `LazyAdam`; or a `keras.optimizers.Adagrad` or `SGD`, whose settings are taken over. The first two
            compute what Keras's dense optimizers of that name do.
        embeddings_initializer: initial values of the table.
        mesh_axis: the axis of the mesh in force over which the rows, and all that is kept for them, are split: see
            `ShardedEmbedding`. Each device then changes the rows that it holds.
        **kwargs: arguments of `keras.layers.Embedding`, but for regularizers and constraints of the table, LoRA and
            quantization.

    Raises:
        NotImplementedError: on another backend than JAX.
        TypeError: if `optimizer` is none.
        ValueError: if an argument is out of range, or goes over all rows.

    Example:
    ```python
    tower = RowSparseEmbedding(1_000_000, 64, optimizer=RowAdagrad(0.1))
    model = keras.Sequential([tower, keras.layers.Dense(1)])
    model.compile("adam", loss="mse")
    model.fit(np.arange(100), np.ones(100), verbose=0)
    ```
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        optimizer: Any = "adagrad",
        embeddings_initializer: Any = "uniform",
        mesh_axis: str | None = None,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "jax":
            raise NotImplementedError(
                "`RowSparseEmbedding` needs the JAX backend. "
                f"Received: {keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        _check_no_sweep(kwargs)
        weights = kwargs.pop("weights", None)
        super().__init__(
            input_dim, output_dim, mesh_axis=mesh_axis, embeddings_initializer=embeddings_initializer, **kwargs
        )
        self.optimizer = row_optimizers.get(optimizer)
        # The tensor that was looked up last while JAX traced a training step, past Keras's tracking of attributes.
        object.__setattr__(self, "_looked_up", None)
        if weights is not None:
            self.build()
            self._embeddings.assign(weights[0] if isinstance(weights, list) else weights)

    def build(self, input_shape: Any = None) -> None:
        """Makes the table and what the optimizer keeps."""
        if self.built:
            return
        super().build(input_shape)
        # As the table lies, though a layout map may name the table alone. While Keras traces a model to build it, the
        # table does not lie anywhere yet.
        row_axis = axis_of_rows(self.mesh_axis, f"{self.path}/embeddings")
        slots = {
            name: add_table(
                self.add_weight,
                f"{self.path}/{name}",
                (self.input_dim, width),
                keras.initializers.Constant(value),
                row_axis,
                dtype="float32",
                name=name,
            )
            for name, (width, value) in self.optimizer.slots(self.output_dim).items()
        }
        object.__setattr__(self, "_slots", slots)
        row_sparse_variable.make_row_sparse(self._embeddings, *slots.values())
        self._iterations = self._scalar("iterations", 0, "int32")
        if isinstance(self.optimizer.learning_rate, float):
            self._learning_rate = self._scalar("learning_rate", self.optimizer.learning_rate, "float32")

    def _scalar(self, name: str, value: float, dtype: str) -> keras.Variable:
        distribution = keras.distribution.distribution()
        layout = None
        if distribution is not None:
            # A layout map that names all of the layer means its tables: a number has no axis to be split.
            layout = keras.distribution.TensorLayout([], distribution.device_mesh)
        initializer = keras.initializers.Constant(value)
        with self._open_name_scope():
            return keras.Variable(
                initializer, shape=(), dtype=dtype, trainable=False, autocast=False, name=name, layout=layout
            )

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the rows, which may be assigned between steps where it is no schedule."""
        if not self.built:
            return self.optimizer.learning_rate
        if isinstance(self.optimizer.learning_rate, float):
            return self._learning_rate
        return self.optimizer.learning_rate(self._iterations)

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        if not self.built or not isinstance(self.optimizer.learning_rate, float):
            raise ValueError(
                "The learning rate can be assigned once the layer is built, and where it is no schedule. Received: "
                f"{learning_rate!r} for {self.optimizer.learning_rate!r} of {self.name!r}. "
                "Pass it to the row optimizer."
            )
        self._learning_rate.assign(row_optimizers.positive_number("learning_rate", learning_rate))

    @property
    def iterations(self) -> Any:
        """How many steps the table has been trained."""
        return self._iterations

    def call(self, inputs: Any) -> Any:
        """Returns the embeddings of `inputs`, integers in `[0, input_dim)`."""
        if not keras.backend.is_int_dtype(inputs.dtype):
            inputs = ops.cast(inputs, "int32")
        table = self._embeddings.value_for_lookup
        step = _Step(self)
        iterations = ops.convert_to_tensor(self._iterations)
        outputs = row_update.look_up(
            row_update.Table(table, {name: slot.value for name, slot in self._slots.items()}),
            inputs,
            self.input_dim,
            self.optimizer,
            ops.cast(self.learning_rate, "float32"),
            ops.cast(iterations + 1, "float32"),
            table_layout(self._embeddings),
            step.when_differentiated,
            self._embeddings.note_update,
        )
        step.is_traced = True
        if step.is_differentiated:
            self._note_step(table)
        return ops.cast(outputs, self.compute_dtype)

    def _note_step(self, table: Any) -> None:
        """Counts the training step that looks the table up, or raises where it does so again."""
        if self._looked_up is not None and self._looked_up() is table:
            raise ValueError(
                "A `RowSparseEmbedding` can be looked up once in a training step, for its gradient is the table after "
                f"the step, and two do not add up. Received: a second lookup of {self.name!r}. "
                "Look all ids up at once: `lookup_together(embedding, [ids, more_ids])`."
            )
        object.__setattr__(self, "_looked_up", weakref.ref(table))
        self._iterations.assign_add(1)

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Raises `ValueError`, for LoRA adds a product as large as the table."""
        _check_no_sweep({"lora_rank": args[0] if args else kwargs.get("rank")})

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Raises `NotImplementedError`, for what is quantized cannot be trained row by row."""
        raise NotImplementedError(
            f"A `RowSparseEmbedding` is trained, not quantized. Received: `quantize` for {self.name!r}. "
            "Assign its `embeddings` to a `keras.layers.Embedding` and quantize that."
        )

    def save_own_variables(self, store: Any) -> None:
        """Saves the table as a plain embedding does, and the other weights by name."""
        super().save_own_variables(store)
        for name, variable in self._other_variables().items():
            store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Loads the weights; of a plain embedding, which has a table alone, the others stay as they are."""
        others = self._other_variables()
        names = set(store.keys())
        if names not in ({"0"}, {"0", *others}):
            raise ValueError(
                "The weights of a `RowSparseEmbedding` must be those of its row optimizer. Received: "
                f"{sorted(names)} for {self.name!r} with {type(self.optimizer).__name__}, which has "
                f"{['0', *others]}. Build it with the optimizer that was saved."
            )
        variables = {"0": self._embeddings, **others}
        for name in names:
            # A mean of squares has the name of the squares, and another shape.
            if tuple(store[name].shape) != tuple(variables[name].shape):
                raise ValueError(
                    "The weights of a `RowSparseEmbedding` must have the shapes of its own. Received: shape "
                    f"{tuple(store[name].shape)} for {variables[name].path!r}, whose shape is "
                    f"{tuple(variables[name].shape)}. Build it with the sizes and the optimizer that were saved."
                )
        for name in names:
            variables[name].assign(store[name])

    def _other_variables(self) -> dict[str, keras.Variable]:
        if not self.built:
            return {}
        others = {**self._slots, "iterations": self._iterations}
        if isinstance(self.optimizer.learning_rate, float):
            others["learning_rate"] = self._learning_rate
        return others

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "optimizer": keras.saving.serialize_keras_object(self.optimizer)}


class _Step:
    """What becomes of a lookup.

    Attributes:
        is_differentiated: whether it is part of a training step.
        is_traced: whether the lookup has returned.
    """

    def __init__(self, embedding: RowSparseEmbedding) -> None:
        self.embedding = embedding
        self.is_differentiated = False
        self.is_traced = False

    def when_differentiated(self) -> None:
        """Notes that the lookup is part of a training step; JAX calls it while it traces the lookup, or later."""
        if self.is_traced:
            # By now the step cannot be counted any more, nor a second lookup be told from the first.
            raise ValueError(
                "A `RowSparseEmbedding` must be looked up in the very function that is differentiated. Received: a "
                f"lookup of {self.embedding.name!r} within a function that JAX traced before, by `jax.jit` or "
                "`jax.checkpoint`. Compile the function that takes the gradient, and leave the lookup out of what is "
                "computed anew."
            )
        self.is_differentiated = True


def lookup_together(tower: keras.layers.Layer, ids: Any) -> Any:
    """Returns the embeddings of several sets of ids, looked up at once.

    Args:
        tower: a layer that adds a last dimension to ids of any shape, such as a `RowSparseEmbedding`.
        ids: a list, tuple or dict of int tensors, symbolic ones too where all have the same first dimension.

    Returns:
        The same structure, of `[..., output_dim]` tensors.

    Raises:
        ValueError: if there are no ids, or symbolic ones of a size unknown beyond the first dimension.

    Example:
    ```python
    tower = RowSparseEmbedding(100, 8)
    positives, negatives = lookup_together(tower, [np.array([3, 7]), np.array([[1, 2], [4, 5], [6, 9]])])
    ```
    """
    tensors = [ops.convert_to_tensor(each) for each in keras.tree.flatten(ids)]
    if not tensors:
        raise ValueError("`ids` must hold at least one tensor. Received: none. Pass the ids that are to be looked up.")
    shapes = [tuple(each.shape) for each in tensors]
    if any(None in shape[1:] for shape in shapes):
        raise ValueError(
            "`ids` must have known sizes, but for the first dimension of symbolic ones. Received: "
            f"shapes {shapes}. Give `keras.Input` the sizes, and fill short rows up with an id."
        )
    # By row where that can be: a batch stays split over the devices as it was.
    by_row = all(shape and shape[0] == shapes[0][0] and 0 not in shape[1:] for shape in shapes)
    axis = 1 if by_row else 0
    widths = [math.prod(shape[axis:]) for shape in shapes]
    rows = [(-1, width) if by_row else (width,) for width in widths]
    together = [ops.reshape(each, row) for each, row in zip(tensors, rows, strict=True)]
    embeddings = tower(ops.concatenate(together, axis=axis))
    parts = ops.split(embeddings, np.cumsum(widths)[:-1].tolist(), axis=axis)
    parts = [
        ops.reshape(part, (*((-1,) if by_row else ()), *shape[axis:], embeddings.shape[-1]))
        for part, shape in zip(parts, shapes, strict=True)
    ]
    return keras.tree.pack_sequence_as(ids, parts)


def _check_no_sweep(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` where an argument of an embedding concerns the whole table in each step."""
    cures = {
        "embeddings_regularizer": "Pass an `activity_regularizer`, which is a penalty on the embeddings of the batch.",
        "embeddings_constraint": "Bound the change by the `clipnorm` of a row optimizer.",
        "lora_rank": "Use a `keras.layers.Embedding`.",
        "quantization_config": "Use a `keras.layers.Embedding`.",
    }
    for name, cure in cures.items():
        if arguments.pop(name, None) is not None:
            raise ValueError(
                f"A `RowSparseEmbedding` trains the rows of the batch alone. Received: `{name}`, which concerns all "
                f"rows in each step. {cure}"
            )
