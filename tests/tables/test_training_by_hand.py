"""Training loops written by hand: an optimizer takes the update that a lookup has computed, and nothing else."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from conftest import data_parallel
from keras import ops

from keras_rs_contrib import LazyAdam, RowAdagrad, RowSparseEmbedding

DIMENSION = 4
IDS = np.array([3, 1, 3, 8], "int32")
NO_UPDATE = r"(?s)must depend on a lookup.*as they are.*Received: a new value for 'table/.*that no lookup has computed"


class Loop:
    """A model of a row-sparse table and a dense layer, trained by functions that take and return its values."""

    def __init__(self, row_optimizer=None, mesh_axis=None):
        keras.utils.set_random_seed(0)
        initializer = keras.initializers.RandomUniform(-1, 1, seed=1)
        self.table = RowSparseEmbedding(
            9, DIMENSION, row_optimizer or RowAdagrad(0.3), initializer, mesh_axis=mesh_axis, name="table"
        )
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")
        self.table.build()
        self.dense.build((None, DIMENSION))
        self.variables = [*self.table.trainable_variables, *self.dense.trainable_variables]
        self.optimizer = keras.optimizers.SGD(0.1)
        self.optimizer.build(self.variables)

    def values(self):
        return [variable.value for variable in self.variables]

    def loss(self, values, ids=IDS, read=None):
        """The loss of a batch; without a lookup if `ids` is `None`."""
        with keras.StatelessScope(state_mapping=list(zip(self.variables, values, strict=True))):
            embeddings = jnp.ones((4, DIMENSION)) if ids is None else self.table(jnp.asarray(ids))
            loss = ops.mean(ops.square(self.dense(embeddings)))
            return loss if read is None else loss + read(self.table)

    def gradients(self, values=None, **arguments):
        return jax.grad(lambda values: self.loss(values, **arguments))(self.values() if values is None else values)

    def apply(self, gradients, values=None):
        """Applies gradients to the variables, or to values, which it returns."""
        if values is None:
            return self.optimizer.apply(gradients, self.variables)
        return self.optimizer.stateless_apply([v.value for v in self.optimizer.variables], gradients, values)[0]

    def snapshot(self):
        return [np.array(variable) for variable in self.variables]

    def assert_refused(self, gradients, message=NO_UPDATE, values=None):
        """Applying the gradients is an error that changes no variable."""
        before = self.snapshot()
        with pytest.raises(ValueError, match=message):
            self.apply(gradients, values)
        for variable, value in zip(self.variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)


def steps_in_fit(num_steps, ids=IDS, row_optimizer=None):
    """Returns the weights after steps of `fit`."""
    loop = Loop(row_optimizer)
    inputs = keras.Input((), dtype="int32")
    model = keras.Model(inputs, loop.dense(loop.table(inputs)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.tile(ids, num_steps), np.zeros((4 * num_steps, 1)), batch_size=4, shuffle=False, verbose=0)
    return loop.snapshot()


@pytest.mark.parametrize(
    ("row_optimizer", "is_stateless", "is_compiled", "mesh_axis"),
    [
        # Variables are assigned outside of compiled functions.
        (RowAdagrad(0.3), False, False, "batch"),
        (LazyAdam(0.3), False, False, None),
        (LazyAdam(0.3), True, False, None),
        (RowAdagrad(0.3), True, True, "batch"),
        (LazyAdam(0.3), True, True, None),
    ],
)
def test_steps_by_hand_match_fit(row_optimizer, is_stateless, is_compiled, mesh_axis):
    expected = steps_in_fit(3, row_optimizer=row_optimizer)
    if mesh_axis is not None:
        keras.distribution.set_distribution(data_parallel(4))
    loop = Loop(row_optimizer, mesh_axis)
    if is_stateless:

        def step(values):
            return loop.apply(loop.gradients(values), values)

        values = loop.values()
        step = jax.jit(step) if is_compiled else step
        if isinstance(row_optimizer, LazyAdam):
            # The number of the step is not one of the values.
            values = step(values)
            expected = steps_in_fit(1, row_optimizer=row_optimizer)
        else:
            for _ in range(3):
                values = step(values)
    else:
        for _ in range(3):
            loop.apply(loop.gradients())
            loop.table.iterations.assign_add(1)
        values = loop.values()
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_stateless", [False, True])
def test_a_gradient_that_is_not_applied_does_not_hide_a_step_without_a_lookup(is_stateless):
    loop = Loop()
    kept = loop.gradients()
    values = loop.values() if is_stateless else None
    loop.assert_refused(loop.gradients(ids=None), values=values)
    # Not even if the other gradient is gone.
    del kept
    loop.gradients()
    loop.assert_refused(loop.gradients(ids=None), values=values)
    expected = steps_in_fit(1)
    loop.apply(loop.gradients())
    for variable, value in zip(loop.variables, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-5)


def test_a_compiled_step_without_a_lookup_after_a_compiled_gradient():
    loop = Loop()

    @jax.jit
    def step(values):
        loop.gradients(values)
        return loop.apply(loop.gradients(values, ids=None), values)

    with pytest.raises(ValueError, match=NO_UPDATE):
        step(loop.values())


CHANGES = {
    "the sum of two": lambda a, b: a + b,
    "the mean of two": lambda a, b: (a + b) / 2,
    "scaled": lambda a, b: 0.5 * a,
    "clipped": lambda a, b: jnp.clip(a, -1, 1),
    "zeros": lambda a, b: jnp.zeros_like(a),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("is_stateless", [False, True])
def test_changed_gradients_raise(change, is_compiled, is_stateless):
    loop = Loop()

    def step(values):
        first, second = (loop.gradients(values, ids=ids) for ids in (IDS, IDS[::-1] // 2))
        gradients = [CHANGES[change](*pair) for pair in zip(first, second, strict=True)]
        return loop.apply(gradients, values if is_stateless else None)

    step = jax.jit(step) if is_compiled else step
    before = loop.snapshot()
    with pytest.raises(ValueError, match=rf"{NO_UPDATE}.*summed, scaled or clipped"):
        step(loop.values())
    if not is_compiled:
        for variable, value in zip(loop.variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)


def test_gradients_of_another_function_raise():
    loop = Loop()
    loop.assert_refused(jax.jit(loop.gradients)(loop.values()))
    gradients = loop.gradients()
    with pytest.raises(ValueError, match=NO_UPDATE):
        jax.jit(loop.apply)(gradients, loop.values())
    # They are still good where they have been computed.
    loop.apply(gradients)


def test_an_update_of_an_older_table_raises():
    loop = Loop()
    first, second = loop.gradients(), loop.gradients(ids=IDS // 2)
    loop.apply(first)
    stale = r"(?s)latest table.*Received: an update of 'table/.*computed before.*Compute the gradient again"
    loop.assert_refused(second, stale)
    loop.assert_refused(first)
    gradients = loop.gradients()
    loop.table.embeddings.assign(2 * loop.table.embeddings)
    loop.assert_refused(gradients, stale)
    loop.apply(loop.gradients())


def test_gradients_for_a_log_do_not_matter():
    loop = Loop()
    gradients = loop.gradients()
    loop.gradients(ids=IDS // 2)
    loop.apply(gradients)
    for variable, value in zip(loop.variables, steps_in_fit(1), strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-5)


def test_copies_of_the_table_may_be_trained_side_by_side():
    loop = Loop()
    start = loop.values()
    first, second = loop.gradients(start), loop.gradients(start, ids=IDS // 2)
    results = [loop.apply(gradients, start) for gradients in (first, second)]
    for values, ids in zip(results, (IDS, IDS // 2), strict=True):
        for value, expected in zip(values, steps_in_fit(1, ids), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-5)
    # A gradient at a copy is one at the table itself.
    loop.apply(loop.gradients([jnp.array(value, copy=True) for value in start]))
    for variable, value in zip(loop.variables, results[0], strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-5)


def test_steps_in_a_scan():
    loop = Loop()

    def step(values, _):
        return loop.apply(loop.gradients(values), values), None

    values, _ = jax.jit(lambda values: jax.lax.scan(step, values, length=3))(loop.values())
    for value, expected in zip(values, steps_in_fit(3), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


# Slots.


def slot_of(table):
    return next(variable for variable in table.trainable_variables if variable is not table.embeddings)


READS = {
    "its value": lambda table: ops.mean(slot_of(table).value),
    "the variable": lambda table: ops.mean(ops.square(slot_of(table))),
    "a row": lambda table: ops.sum(slot_of(table)[3]),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_loss_that_reads_a_slot_raises(read, is_compiled):
    loop = Loop()

    def step(values):
        return loop.gradients(values, read=READS[read])

    with pytest.raises(ValueError, match=r"(?s)must come from a lookup only.*'table/accumulator'.*stop_gradient"):
        (jax.jit(step) if is_compiled else step)(loop.values())
    constant = loop.gradients(read=lambda table: ops.stop_gradient(READS[read](table)))
    loop.apply(constant)
    for variable, value in zip(loop.variables, steps_in_fit(1), strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_a_loss_that_reads_the_values_themselves_raises(number):
    loop = Loop()
    gradients = jax.grad(lambda values: loop.loss(values) + jnp.sum(values[number]))(loop.values())
    loop.assert_refused(gradients)


def test_fit_with_a_loss_that_reads_a_slot_raises():
    class Reading(keras.Model):
        def __init__(self):
            super().__init__()
            self.table, self.dense = RowSparseEmbedding(9, DIMENSION, name="table"), keras.layers.Dense(1)

        def call(self, x):
            return self.dense(self.table(x))

        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            return ops.mean(ops.square(y_pred)) + ops.mean(slot_of(self.table))

    for run_eagerly in (False, True):
        model = Reading()
        model.compile("sgd", run_eagerly=run_eagerly)
        with pytest.raises(ValueError, match=r"must come from a lookup only.*accumulator"):
            model.fit(np.arange(8), np.zeros((8, 1)), verbose=0)
