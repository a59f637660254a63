"""An embedding whose training step costs what the batch costs, however large the table."""

from __future__ import annotations

import weakref
from typing import Any

import keras
from keras import ops

from keras_rs_contrib.tables import row_optimizers, row_update
from keras_rs_contrib.tables.layout import axis_of_rows, table_layout
from keras_rs_contrib.tables.padding import DEFAULT_ROW_MULTIPLE
from keras_rs_contrib.tables.row_variable import RowSparseTable, RowSparseVariable, tie
from keras_rs_contrib.tables.sharded_embedding import ShardedEmbedding


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
        row_multiple: int = DEFAULT_ROW_MULTIPLE,
        **kwargs: Any,
    ) -> None:
        if keras.backend.backend() != "jax":
            raise NotImplementedError(
                "`RowSparseEmbedding` needs the JAX backend. "
                f"Received: {keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        _check_no_sweep(kwargs)
        # Before the constructor of the base class, which builds the layer if it is given weights.
        row_optimizer = row_optimizers.get(optimizer)
        weights = kwargs.pop("weights", None)
        super().__init__(
            input_dim,
            output_dim,
            mesh_axis=mesh_axis,
            row_multiple=row_multiple,
            embeddings_initializer=embeddings_initializer,
            **kwargs,
        )
        self.optimizer = row_optimizer
        # The tensor that was looked up last while JAX traced a training step, hidden from Keras's attribute tracking.
        object.__setattr__(self, "_looked_up", None)
        self._assign_weights(weights)

    def _add_table(self, name: str, shape: tuple[int, int], **kwargs: Any) -> keras.Variable:
        # Autocasting would round the next value, and make the table a new tensor in each lookup.
        return super()._add_table(name, shape, **{"variable_class": RowSparseTable, **kwargs, "autocast": False})

    def build(self, input_shape: Any = None) -> None:
        """Creates the table and the slots of its optimizer."""
        if self.built:
            return
        super().build(input_shape)
        # The slots are laid out like the table, even if a layout map names the table alone.
        row_axis = axis_of_rows(self.mesh_axis, f"{self.path}/embeddings")
        self._slots = {
            name: self._add_table(
                name,
                (self.input_dim, width),
                initializer=keras.initializers.Constant(value),
                mesh_axis=row_axis,
                variable_class=RowSparseVariable,
                dtype="float32",
            )
            for name, (width, value) in self.optimizer.slots(self.output_dim).items()
        }
        tie(self.embeddings, tuple(self._slots.values()))
        self._iterations = self._scalar("iterations", 0, "int32")
        if isinstance(self.optimizer.learning_rate, float):
            self._learning_rate = self._scalar("learning_rate", self.optimizer.learning_rate, "float32")
        self._freeze_new_weights()

    def _scalar(self, name: str, value: float, dtype: str) -> keras.Variable:
        distribution = keras.distribution.distribution()
        replicated = {}
        if distribution is not None:
            # A layout map that matches the whole layer means its tables: a scalar has no axis to split.
            replicated["layout"] = keras.distribution.TensorLayout([], distribution.device_mesh).backend_layout
        initializer = keras.initializers.Constant(value)
        with keras.name_scope(self.name, caller=self):
            return keras.Variable(
                initializer, shape=(), dtype=dtype, trainable=False, autocast=False, name=name, **replicated
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
        table = self.embeddings.value_for_lookup
        step = _Step(self)
        iterations = ops.convert_to_tensor(self._iterations)
        outputs = row_update.look_up(
            row_update.Table(table, {name: slot.value for name, slot in self._slots.items()}),
            inputs,
            self.input_dim,
            self.optimizer,
            ops.cast(self.learning_rate, "float32"),
            ops.cast(iterations + 1, "float32"),
            table_layout(self.embeddings),
            step.when_differentiated,
            self.embeddings.update.note,
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
        store = self._unpadded(store)
        for name, variable in self._other_variables().items():
            store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Loads the weights. A plain embedding has saved its table alone; then the others stay as they are."""
        others = self._other_variables()
        names = set(store.keys())
        if names not in ({"0"}, {"0", *others}):
            raise ValueError(
                "The weights of a `RowSparseEmbedding` must be those of its row optimizer. Received: "
                f"{sorted(names)} for {self.name!r} with {type(self.optimizer).__name__}, which has "
                f"{['0', *others]}. Build it with the optimizer that was saved."
            )
        variables = {"0": self.embeddings, **others}
        for name in names:
            # A mean of squares has the name of the squares, and another shape.
            expected = (self.input_dim, *variables[name].shape[1:]) if variables[name].shape else ()
            if tuple(store[name].shape) != expected:
                raise ValueError(
                    "The weights of a `RowSparseEmbedding` must have the shapes of its own. Received: shape "
                    f"{tuple(store[name].shape)} for {variables[name].path!r}, whose shape without padding is "
                    f"{expected}. Build it with the sizes and the optimizer that were saved."
                )
        unpadded = self._unpadded(store)
        for name in names:
            variables[name].assign(unpadded[name])

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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RowSparseEmbedding:
        """Returns the layer that `get_config` describes."""
        # Unlike those of other tables, slots are weights of the layer, and so old files can get padding.
        embedding: RowSparseEmbedding = super().from_config({"row_multiple": DEFAULT_ROW_MULTIPLE, **config})
        return embedding


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
