"""An embedding whose training step depends on the size of the batch, not on the size of the table."""

from __future__ import annotations

import weakref
from typing import Any

import keras
from keras import ops

from keras_rs_contrib.arguments import explains_keywords
from keras_rs_contrib.distribution import layout_axes
from keras_rs_contrib.tables import row_optimizers, row_update
from keras_rs_contrib.tables.layout import axis_of_rows, has_axis, table_layout
from keras_rs_contrib.tables.padding import DEFAULT_ROW_MULTIPLE, check_table_layout
from keras_rs_contrib.tables.row_variable import RowSparseTable, RowSparseVariable, tie
from keras_rs_contrib.tables.sharded_embedding import ShardedEmbedding, dense_ids


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class RowSparseEmbedding(ShardedEmbedding):
    """A `keras.layers.Embedding` that updates only the rows of the batch, with its own row optimizer.

    The gradient of a plain embedding is as large as the table, and its optimizer updates all rows in each step. This
    layer reads and writes only the rows of the batch, in place. The time of a step depends on the batch, not on the
    number of rows in the table. The layer works in `fit` and with any Keras optimizer, which trains the other weights
    of the model. The learning rate, weight decay and clipping of that optimizer do not apply to the rows.

    Random rows of a large table miss the caches of a CPU. On Linux, huge pages save about a third of that: start Python
    with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.

    In `TwoTowerModel.fit`, callbacks that set the learning rate of the optimizer, such as
    `keras.callbacks.LearningRateScheduler` and `ReduceLROnPlateau`, change that of the rows by the same factor. The
    factor counts from the rates at the start of `fit`: compile the optimizer with the rate that goes with that of the
    row optimizer. In other models, such callbacks do not reach the rows. Set `layer.learning_rate` there, in a callback
    of your own or between steps, or pass a schedule to the row optimizer.

    The slots of the row optimizer are weights of the layer, so they are saved and restored with it. They count as
    trainable weights, because Keras optimizers overwrite only trainable weights with the values that a step computes.

    A training step must look up the table exactly once. Join several lookups with `lookup_together`. The gradient of
    the table must come from this lookup only. The optimizer of `compile` must not accumulate or scale gradients, or
    average weights. Violations of these rules raise an error.

    `jax.grad` returns the table and its slots after the step, or 0 if the loss does not depend on a lookup. Assign
    these values and apply the gradients of the other weights, or let a Keras optimizer do both. The number of steps is
    one of the non-trainable weights that `stateless_call` returns. A Keras optimizer takes only a value that a lookup
    has computed, from the latest table: a sum or a scaled gradient is an error. Values that you assign yourself cannot
    be checked, and neither can other optimizers, such as those of Optax, which would take them for gradients.

    Out-of-range ids return NaN, as in a plain embedding. A batch with such an id changes no row.

    Args:
        input_dim: positive int, the number of ids.
        output_dim: positive int, the size of an embedding.
        optimizer: `"adagrad"`, `"sgd"`, `"rowwise_adagrad"`, `"lazy_adam"`; a `RowAdagrad`, `RowSGD`, `RowWiseAdagrad`
            or `LazyAdam`; or a `keras.optimizers.Adagrad` or `SGD`, whose settings are copied. `"adagrad"` and `"sgd"`
            have the same result as Keras's dense optimizers of these names.
        embeddings_initializer: initializer of the table.
        mesh_axis: axis of the mesh in force that splits the rows and their slots: see `ShardedEmbedding`. Each device
            updates the rows that it holds.
        row_multiple: the number of rows is padded to a multiple of this: see `ShardedEmbedding`.
        **kwargs: other arguments of `keras.layers.Embedding`. Regularizers and constraints of the table, LoRA,
            quantization, and dtypes other than float16, bfloat16 and float32 are not supported.

    Raises:
        NotImplementedError: on training, if the Keras backend is not JAX.
        TypeError: if the type of `optimizer` is not supported.
        ValueError: if an argument is out of range or not supported, or would process all rows in each step.

    Example:
    ```python
    tower = RowSparseEmbedding(1_000_000, 64, optimizer=RowAdagrad(0.1))
    model = keras.Sequential([tower, keras.layers.Dense(1)])
    model.compile("adam", loss="mse")
    model.fit(np.arange(100), np.ones(100), verbose=0)
    ```
    """

    is_trained_by_row = True
    # The rates, of the optimizer of `compile` and of the rows, from which the factor between the two counts.
    reference_rates: tuple[float, float] | None = None

    @explains_keywords
    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        optimizer: Any = "adagrad",
        embeddings_initializer: Any = "uniform",
        *,
        mesh_axis: str | None = None,
        row_multiple: int = DEFAULT_ROW_MULTIPLE,
        **kwargs: Any,
    ) -> None:
        _check_no_sweep(kwargs)
        # The constructor of the base class would build the layer if it received weights, before the optimizer is set.
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
        # The tensor of the last lookup in a traced training step. Set this way to bypass Keras's attribute tracking.
        object.__setattr__(self, "_looked_up", None)
        # What answers a call in place of a lookup, while several lookups are joined.
        object.__setattr__(self, "answer", None)
        self._assign_weights(weights)

    def _add_table(self, name: str, shape: tuple[int, int], **kwargs: Any) -> keras.Variable:
        # Autocast would round the next value, and would create a new tensor in each lookup.
        return super()._add_table(name, shape, **{"variable_class": RowSparseTable, **kwargs, "autocast": False})

    def build(self, input_shape: Any = None) -> None:
        """Creates the table and the slots of its optimizer."""
        if self.built:
            return
        path = f"{self.path or self.name}/embeddings"
        shape = (self.num_padded_rows, self.output_dim)
        check_table_layout(shape, self.row_multiple, self.mesh_axis, path)
        axes = layout_axes(path, shape)
        if any(axes[1:]) and not has_axis(self.mesh_axis):
            raise ValueError(
                "The table of a `RowSparseEmbedding` must be split over its rows only. Received: "
                f"layout {axes} for {path!r}. Change its layout to (axis, None) in the layout map."
            )
        # Before the table, which marks the layer as built, and so attributes of the layer only after it.
        slots = {
            name: self._add_table(
                name,
                (self.input_dim, width),
                initializer=keras.initializers.Constant(value),
                mesh_axis=axis_of_rows(self.mesh_axis, path),
                # The slots are laid out like the table, whatever the layout map says of them.
                follows_layout_map=False,
                variable_class=RowSparseVariable,
                dtype="float32",
            )
            for name, (width, value) in self.optimizer.slots(self.output_dim).items()
        }
        step_count = self._scalar("iterations", 0, "int32")
        learning_rate = None
        if isinstance(self.optimizer.learning_rate, float):
            learning_rate = self._scalar("learning_rate", self.optimizer.learning_rate, "float32")
        super().build(input_shape)
        self._slots, self._step_count = slots, step_count
        if learning_rate is not None:
            self._current_learning_rate = learning_rate
        tie(self.embeddings, tuple(slots.values()))
        self._freeze_new_weights()

    def _scalar(self, name: str, value: float, dtype: str) -> keras.Variable:
        distribution = keras.distribution.distribution()
        replicated = {}
        if distribution is not None:
            # A layout map may match all variables of the layer, but a scalar has no axis to split.
            replicated["layout"] = keras.distribution.TensorLayout([], distribution.device_mesh).backend_layout
        initializer = keras.initializers.Constant(value)
        with keras.name_scope(self.name, caller=self):
            return keras.Variable(
                initializer, shape=(), dtype=dtype, trainable=False, autocast=False, name=name, **replicated
            )

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the rows. It can be assigned between steps, unless it is a schedule."""
        if not self.built:
            return self.optimizer.learning_rate
        if isinstance(self.optimizer.learning_rate, float):
            return self._current_learning_rate
        return self.optimizer.learning_rate(self._step_count)

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        if not self.built or not isinstance(self.optimizer.learning_rate, float):
            raise ValueError(
                "The learning rate can be assigned only once the layer is built, and only if it is not a schedule. "
                f"Received: {learning_rate!r} for {self.optimizer.learning_rate!r} of {self.name!r}. "
                "Pass it to the row optimizer instead."
            )
        self._current_learning_rate.assign(row_optimizers.positive_number("learning_rate", learning_rate))

    @property
    def iterations(self) -> Any:
        """The number of training steps of the table, an int32 variable."""
        if not self.built:
            raise AttributeError(
                "The number of steps exists once the layer is built. Received: `iterations` of "
                f"{self.name!r}, which is not built. Call `build()` first."
            )
        return self._step_count

    def call(self, inputs: Any) -> Any:
        """Returns the embeddings of `inputs`, integers in `[0, input_dim)`, as a dense or sparse tensor."""
        inputs = dense_ids(inputs)
        if not keras.backend.is_int_dtype(inputs.dtype):
            inputs = ops.cast(inputs, "int32")
        if keras.backend.backend() != "jax":
            return super().call(inputs)
        if self.answer is not None:
            return self.answer(inputs)
        table = self.embeddings.value_for_lookup
        step = _Step(self)
        iterations = ops.convert_to_tensor(self._step_count)
        outputs = row_update.look_up(
            row_update.Table(table, {name: slot.value_for_lookup for name, slot in self._slots.items()}),
            inputs,
            self.input_dim,
            self.optimizer,
            ops.cast(self.learning_rate, "float32"),
            ops.cast(iterations + 1, "float32"),
            table_layout(self.embeddings),
            step.when_differentiated,
            self.embeddings.updates.note,
        )
        step.is_traced = True
        if step.is_differentiated:
            self._note_step(table)
        return ops.cast(outputs, self.compute_dtype)

    def _note_step(self, table: Any) -> None:
        """Counts a training step, or raises `ValueError` if the step has already looked up the table."""
        if self._looked_up is not None and self._looked_up() is table:
            raise ValueError(
                "A `RowSparseEmbedding` can be looked up once in a training step: its gradient is the table after the "
                f"step, and two such gradients cannot be added. Received: a second lookup of {self.name!r}. "
                "Look up all ids in one call: `lookup_together(embedding, [ids, more_ids])`."
            )
        object.__setattr__(self, "_looked_up", weakref.ref(table))
        self._step_count.assign_add(1)

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Raises `ValueError`, because LoRA adds a product as large as the table."""
        _check_no_sweep({"lora_rank": True})

    def save_own_variables(self, store: Any) -> None:
        """Saves the table as a plain embedding does, and the other weights by name."""
        super().save_own_variables(store)
        store = self._unpadded(store)
        for name, variable in self._other_variables().items():
            store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Loads the weights. A file of a plain embedding contains only the table, and changes no other weights."""
        if not self.built:
            # As in Keras, an error if the file contains weights.
            super().load_own_variables(store)
            return
        others = self._other_variables()
        names = set(store.keys())
        if names not in ({"0"}, {"0", *others}):
            raise ValueError(
                "The saved weights of a `RowSparseEmbedding` must match its row optimizer. Received: "
                f"{sorted(names)} for {self.name!r} with {type(self.optimizer).__name__}, which has "
                f"{['0', *others]}. Build the layer with the saved optimizer."
            )
        variables = {"0": self.embeddings, **others}
        for name in names:
            # The slots of `RowAdagrad` and `RowWiseAdagrad` have the same name but different shapes.
            expected = (self.input_dim, *variables[name].shape[1:]) if len(variables[name].shape) else ()
            if tuple(store[name].shape) != expected:
                raise ValueError(
                    "The saved weights of a `RowSparseEmbedding` must have the shapes of its weights. Received: shape "
                    f"{tuple(store[name].shape)} for {variables[name].path!r}, whose shape without padding is "
                    f"{expected}. Build the layer with the saved sizes and the saved optimizer."
                )
        unpadded = self._unpadded(store)
        # In the same order in all processes, which compare the values.
        for name in sorted(names):
            variables[name].assign(unpadded[name])

    def _other_variables(self) -> dict[str, keras.Variable]:
        if not self.built:
            return {}
        others = {**self._slots, "iterations": self._step_count}
        if isinstance(self.optimizer.learning_rate, float):
            others["learning_rate"] = self._current_learning_rate
        return others

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "optimizer": keras.saving.serialize_keras_object(self.optimizer)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RowSparseEmbedding:
        """Creates a layer from its config."""
        # The slots are weights of the layer, so loading can add padding to files of version 0.1.
        embedding: RowSparseEmbedding = super().from_config({"row_multiple": DEFAULT_ROW_MULTIPLE, **config})
        return embedding


class _Step:
    """The state of a lookup while JAX traces it.

    Attributes:
        is_differentiated: whether the lookup is part of a training step.
        is_traced: whether the lookup has returned.
    """

    def __init__(self, embedding: RowSparseEmbedding) -> None:
        self.embedding = embedding
        self.is_differentiated = False
        self.is_traced = False

    def when_differentiated(self) -> None:
        """Marks the lookup as part of a training step. JAX calls this during or after the trace of the lookup."""
        if self.is_traced:
            # It is too late to count the step, or to detect a second lookup.
            raise ValueError(
                "A `RowSparseEmbedding` must be looked up directly in the function that is differentiated. Received: "
                f"a lookup of {self.embedding.name!r} inside a function that JAX has traced before, by `jax.jit` or "
                "`jax.checkpoint`. Compile the function that computes the gradient, and keep the lookup outside of "
                "`jax.checkpoint`."
            )
        self.is_differentiated = True


def _check_no_sweep(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` if an argument of an embedding would process the whole table in each step."""
    fixes = {
        "embeddings_regularizer": "Pass an `activity_regularizer`, a penalty on the embeddings of the batch.",
        "embeddings_constraint": "Limit the updates with the `clipnorm` of a row optimizer.",
        "lora_rank": "Use a `keras.layers.Embedding`.",
        "lora_alpha": "Use a `keras.layers.Embedding`.",
        "quantization_config": "Use a `keras.layers.Embedding`.",
    }
    for name, fix in fixes.items():
        if arguments.pop(name, None) is not None:
            raise ValueError(
                f"A `RowSparseEmbedding` processes only the rows of the batch. Received: `{name}`, which needs all "
                f"rows in each step. {fix}"
            )
