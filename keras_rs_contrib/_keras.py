"""Every use of a private part of Keras, with its reason and the public API that would replace it.

No other module imports `keras.src` or reads an attribute of a Keras object whose name starts with an underscore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops
from keras.src.backend.common import global_state

# 1. `fit` turns arrays, datasets and generators into batches by these classes, and accepts an adapter in their place.
#    Padding must happen between the two. Replacement: a public `keras.utils.DataAdapter`.
from keras.src.trainers.data_adapters import GeneratorDataAdapter, TFDatasetAdapter, get_data_adapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

__all__ = [
    "DataAdapter",
    "GeneratorDataAdapter",
    "LossPerExample",
    "dataset_of",
    "distributable_targets",
    "forget_uninitialized_variables",
    "get_data_adapter",
    "get_layout",
    "get_learning_rate",
    "has_value",
    "holding",
    "is_in_stateless_scope",
    "is_loading",
    "is_saving",
    "is_tracing_symbolically",
    "num_calls_of_shared",
    "set_layout",
    "set_shape",
    "sharing_objects",
    "start_at_epoch",
    "sublayers",
    "uninitialized_variables",
]


def distributable_targets(y: Any) -> Any:
    """Returns the targets of a batch, in a form that Keras distributes: before 3.15 it fails on `None`."""
    major, minor = keras.version().split(".")[:2]
    # An empty structure has no array that Keras would look for.
    return () if y is None and (int(major), int(minor)) < (3, 15) else y


def dataset_of(adapter: Any) -> Any:
    """Returns the `tf.data.Dataset` that an adapter reads, or `None` if it reads other data."""
    return adapter.get_tf_dataset() if isinstance(adapter, TFDatasetAdapter) else None


def is_loading() -> bool:
    """Returns whether Keras is loading a `.keras` file.

    A file names the mesh axis that it was saved with, which the mesh in force may lack. That is an error for a user and
    not for a file. Replacement: a public query, such as `keras.saving.is_loading()`.
    """
    # 2. Keras's global state is the only trace of a file being loaded.
    objects = global_state.get_global_attribute("shared_objects/id_to_obj_map")
    return objects is not None and not isinstance(objects, _SharedObjects)


def is_saving() -> bool:
    """Returns whether Keras is writing a `.keras` file, which contains the assets of layers beside their configs.

    Replacement: a public query, such as `keras.saving.is_saving()`.
    """
    # 2. The same global state, which Keras also sets while it loads a file.
    return is_loading()


class _SharedObjects(dict[int, Any]):
    """The objects that a config outside of a file shares."""


@contextlib.contextmanager
def sharing_objects(is_loading: bool = False) -> Iterator[None]:
    """Lets layers that occur several times in a config come back as one layer each, as Keras does within files.

    Replacement: a public `keras.saving.ObjectSharingScope`.

    Args:
        is_loading: whether the config is that of a file.
    """
    # 2. The same global state.
    names = ("shared_objects/id_to_obj_map", "shared_objects/id_to_config_map")
    if global_state.get_global_attribute(names[0]) is not None:
        yield
        return
    try:
        for name in names:
            global_state.set_global_attribute(name, {} if is_loading else _SharedObjects())
        yield
    finally:
        for name in names:
            global_state.set_global_attribute(name, None)


def num_calls_of_shared(config: dict[str, Any]) -> int:
    """Returns how many symbolic calls a layer has recorded that a config shares, or 0 if it has not been created yet.

    Replacement: none is needed once `keras.Model.from_config` counts from the calls that a shared layer has recorded.
    """
    # 2. The same global state, and 10. the record of the calls, by whose position a functional model finds its tensors.
    objects = global_state.get_global_attribute("shared_objects/id_to_obj_map") or {}
    layer = objects.get(config.get("shared_object_id"))
    return len(layer._inbound_nodes) if isinstance(layer, keras.layers.Layer) else 0


def uninitialized_variables() -> list[keras.Variable]:
    """Returns the variables that Keras has created in a trace, and initializes at its end.

    Replacement: none is needed once Keras itself forgets a variable that it fails to initialize.
    """
    # 2. The same global state.
    return list(global_state.get_global_attribute("uninitialized_variables") or [])


def forget_uninitialized_variables(variables: list[keras.Variable]) -> None:
    """Removes variables from those that Keras is to initialize.

    Keras keeps all variables of a trace if it fails to initialize one of them. From then on, each trace in the process
    ends in the same error. Replacement: as in `uninitialized_variables`.
    """
    # 2. The same global state. Variables compare by value, so they are compared by `id`.
    ids = {id(variable) for variable in variables}
    kept = [variable for variable in uninitialized_variables() if id(variable) not in ids]
    global_state.set_global_attribute("uninitialized_variables", kept)


def is_in_stateless_scope() -> bool:
    """Returns whether Keras is in a trace, at whose end it initializes variables.

    Replacement: a public query, such as `keras.in_stateless_scope()`.
    """
    # 2. The same global state.
    return global_state.get_global_attribute("stateless_scope") is not None


def is_tracing_symbolically() -> bool:
    """Returns whether Keras is tracing a model for shapes and dtypes alone.

    Keras then makes up batch sizes, which must not be checked against the number of devices. Replacement: a public
    query, such as `keras.in_symbolic_scope()`.
    """
    # 2. The same global state.
    return global_state.get_global_attribute("symbolic_scope") is not None


def start_at_epoch(model: keras.Model, epoch: int | None) -> None:
    """Lets the `fit` that is calling `on_train_begin` start at an epoch; `None` for its argument `initial_epoch`.

    Keras keeps it for later calls of `fit`, until it is set to `None`. Replacement: a public way to resume.
    """
    # 3. As in `keras.callbacks.BackupAndRestore`.
    model._initial_epoch = epoch


def get_layout(variable: keras.Variable) -> Any:
    """Returns the JAX sharding of a variable, or `None`.

    Within `fit`, variables have no value whose sharding could be read. Replacement: a public property
    `keras.Variable.layout`.
    """
    # 4. Depending on the release of Keras, it holds a `TensorLayout` or its JAX sharding.
    layout = getattr(variable, "_layout", None)
    return layout.backend_layout if isinstance(layout, keras.distribution.TensorLayout) else layout


def set_layout(variable: keras.Variable, sharding: Any) -> None:
    """Moves a variable to a JAX sharding, with the optimizer slots that are created for it later.

    A built `Embedding` that an index splits needs it. Replacement: a public setter of `keras.Variable.layout`.
    """
    # 4. The same attribute.
    previous = variable._layout
    variable._layout = sharding
    try:
        if has_value(variable):
            variable.assign(variable.value)
    except BaseException:
        variable._layout = previous
        raise


@contextlib.contextmanager
def holding(values: list[tuple[keras.Variable, Any]]) -> Iterator[None]:
    """Lets variables hold other values, within `with`, without a layout.

    Keras cannot save a variable whose value spans several processes. Replacement: a public `keras.saving` that gathers
    the value.

    Args:
        values: each variable and its value on one device.
    """
    # 4. The same attribute.
    before = [(variable, variable._layout, variable.value) for variable, _ in values]
    try:
        for variable, value in values:
            variable._layout = None
            variable.assign(value)
        yield
    finally:
        for variable, layout, value in before:
            variable._layout = layout
            variable.assign(value)


def set_shape(variable: keras.Variable, shape: tuple[int, ...]) -> None:
    """Lets the next value that is assigned to a variable have another shape.

    A corpus grows and shrinks. A new variable would need Keras to forget the old one, which is private as well.
    Replacement: variables with `None` in their shape.
    """
    # 5. Keras compares each new value with this shape.
    variable._shape = shape


def has_value(variable: keras.Variable) -> bool:
    """Returns whether a variable has a value.

    It has none while Keras traces the model that creates it, and after a `fit` that failed before its first step, from
    which the caller restores it. Replacement: a `fit` that restores weights when it fails.
    """
    # 6. `variable.value` raises, or computes initial values, instead of telling.
    return variable._value is not None


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all layers within it.

    Replacement: a public `layers` of every `keras.layers.Layer`, as models have.
    """
    # 7. Only models list their layers publicly.
    return list(layer._flatten_layers())


def get_learning_rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the variable, the schedule or the function that an optimizer takes its learning rate from.

    Replacement: a public property that returns the schedule.
    """
    # 8. `optimizer.learning_rate` computes the current value of a schedule, and its config does not load without
    #    the schedule being registered.
    return optimizer._learning_rate


class LossPerExample(keras.Model):  # type: ignore[misc]
    """A model whose epoch loss weighs each batch by the examples that are present in it.

    Keras weighs the mean loss of a batch by its padded length. Replacement: a public hook that updates the loss metric.
    """

    # 9. As in Keras, but for the weight.
    def _update_metrics_variables(
        self, metrics_variables: Any, unscaled_loss: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any
    ) -> tuple[dict[str, Any], list[Any]]:
        mapping = list(zip(self.metrics_variables, metrics_variables, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            if sample_weight is None:
                num_examples = next(iter(keras.tree.flatten(x))).shape[0]
            else:
                num_examples = ops.sum(ops.cast(ops.not_equal(sample_weight, 0), "float32"))
            self._loss_tracker.update_state(unscaled_loss, sample_weight=num_examples)
            logs = self.compute_metrics(x, y, y_pred, sample_weight)
        values = [scope.get_current_value(variable) for variable in self.metrics_variables]
        return logs, [old if new is None else new for new, old in zip(values, metrics_variables, strict=True)]

    if keras.backend.backend() == "tensorflow":

        def test_step(self, data: Any) -> dict[str, Any]:
            """Evaluates a batch on TensorFlow."""
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            y_pred = self(x, training=False)
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=False)
            num_examples = ops.sum(ops.cast(ops.not_equal(sample_weight, 0), "float32"))
            # 9. As above.
            self._loss_tracker.update_state(loss, sample_weight=num_examples)
            return self.compute_metrics(x, y, y_pred, sample_weight)  # type: ignore[no-any-return]
