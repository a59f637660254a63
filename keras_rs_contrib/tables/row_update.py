"""A lookup in a table whose gradient is the table after a step of its own optimizer: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from keras_rs_contrib.tables.layout import TableLayout
from keras_rs_contrib.tables.row_optimizers import RowOptimizer


class Table(NamedTuple):
    """A table and what its optimizer keeps for each row.

    Attributes:
        embeddings: `[num_rows_on_mesh, output_dim]`.
        slots: `[num_rows_on_mesh, width]` float32 each, by name.
    """

    embeddings: Any
    slots: dict[str, Any]


def look_up(
    table: Table,
    ids: Any,
    num_rows: int,
    optimizer: RowOptimizer,
    learning_rate: Any,
    step: Any,
    layout: TableLayout | None,
    when_differentiated: Callable[[], None],
    when_updated: Callable[[], None],
) -> Any:
    """Returns the rows of `ids`; the gradient of the table, and of each slot, is its value after a step.

    Duplicates among the ids count as one row with the sum of their gradients. Where an id has no row, no row changes.

    Args:
        table: the table.
        ids: `[...]` ints; negative ones count from the last row, as in NumPy.
        num_rows: rows of the table without padding.
        optimizer: what changes the rows.
        learning_rate: float32 scalar.
        step: float32 scalar, the number of the step, from 1 on.
        layout: how the table lies on the mesh, or `None` where it lies on one device.
        when_differentiated: called where JAX traces the lookup for its gradient.
        when_updated: called where JAX traces the gradient itself, which it leaves out where the loss does not depend on
            the lookup.

    Returns:
        `[..., output_dim]` of the table's dtype; NaN where an id has no row.
    """
    row_ids = jnp.ravel(ids)
    if jnp.issubdtype(row_ids.dtype, jnp.unsignedinteger):
        # What is beyond int32 must not wrap around into the table.
        row_ids = jnp.minimum(row_ids, np.iinfo("int32").max)
    row_ids = row_ids.astype("int32")
    row_ids = jnp.where(row_ids < 0, row_ids + num_rows, row_ids)
    has_row = (row_ids >= 0) & (row_ids < num_rows)
    row_ids = jnp.where(has_row, row_ids, table.embeddings.shape[0])

    @jax.custom_vjp
    def lookup(table: Table, row_ids: Any, learning_rate: Any, step: Any) -> Any:
        return _gathered(table.embeddings, row_ids, layout)

    def forward(table: Table, row_ids: Any, learning_rate: Any, step: Any) -> tuple[Any, Any]:
        when_differentiated()
        return lookup(table, row_ids, learning_rate, step), (table, row_ids, learning_rate, step)

    def backward(residuals: Any, gradients: Any) -> tuple[Table, None, None, None]:
        when_updated()
        table, row_ids, learning_rate, step = residuals
        # A batch with an id out of range is NaN, and so are all its gradients: they are not to reach the other rows.
        any_without = jnp.any(row_ids == table.embeddings.shape[0])
        row_ids = jnp.where(any_without, table.embeddings.shape[0], row_ids)
        return _updated(table, row_ids, gradients, optimizer, learning_rate, step, layout), None, None, None

    lookup.defvjp(forward, backward)
    rows = lookup(table, row_ids, learning_rate, step)
    return jnp.reshape(rows, (*jnp.shape(ids), rows.shape[-1]))


def constant(table: Any, name: str) -> Any:
    """Returns a table, through which no gradient may flow: there JAX gets an error."""

    @jax.custom_vjp
    def identity(table: Any) -> Any:
        return table

    def backward(_: None, gradient: Any) -> Any:
        raise ValueError(
            f"The table of a `RowSparseEmbedding` gets gradients by lookups alone. Received: a gradient for {name!r}, "
            "from a computation on the table itself. Look the rows up through the layer, wrap the table in "
            "`keras.ops.stop_gradient`, or use a `keras_rs_contrib.ShardedEmbedding`."
        )

    identity.defvjp(lambda table: (table, None), backward)
    return identity(table)


def _gathered(embeddings: Any, row_ids: Any, layout: TableLayout | None) -> Any:
    """Returns the `[num_ids, output_dim]` rows, NaN where there is none."""
    if layout is None or layout.row_axis is None:
        return jnp.take(embeddings, row_ids, axis=0, mode="fill", fill_value=jnp.nan)
    ids_axis = _ids_axis(row_ids, layout)
    row_axis = layout.row_axis

    def gather(shard: Any, row_ids: Any) -> Any:
        if ids_axis == row_axis:
            row_ids = jax.lax.all_gather(row_ids, row_axis, tiled=True)
        local = _local_ids(row_ids, shard.shape[0], row_axis)
        rows = jnp.take(shard, local, axis=0, mode="fill", fill_value=0)
        if ids_axis == row_axis:
            return jax.lax.psum_scatter(rows, row_axis, tiled=True)
        return jax.lax.psum(rows, row_axis)

    rows = jax.shard_map(
        gather,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(row_axis), PartitionSpec(ids_axis)),
        out_specs=PartitionSpec(ids_axis),
        check_vma=False,
    )(embeddings, row_ids)
    return jnp.where(jnp.expand_dims(row_ids, 1) < embeddings.shape[0], rows, jnp.nan)


def _updated(
    table: Table,
    row_ids: Any,
    gradients: Any,
    optimizer: RowOptimizer,
    learning_rate: Any,
    step: Any,
    layout: TableLayout | None,
) -> Table:
    if layout is None:
        return _with_rows_updated(table, row_ids, gradients, optimizer, learning_rate, step)
    ids_axis = _ids_axis(row_ids, layout)
    row_axis = layout.row_axis

    def update(shard: Table, row_ids: Any, gradients: Any, learning_rate: Any, step: Any) -> Table:
        # Each device sees the whole batch and changes the rows that it holds: what travels is as large as the batch.
        if ids_axis is not None:
            row_ids = jax.lax.all_gather(row_ids, ids_axis, tiled=True)
            gradients = jax.lax.all_gather(gradients, ids_axis, tiled=True)
        if row_axis is not None:
            row_ids = _local_ids(row_ids, shard.embeddings.shape[0], row_axis)
        return _with_rows_updated(shard, row_ids, gradients, optimizer, learning_rate, step)

    result: Table = jax.shard_map(
        update,
        mesh=layout.mesh,
        in_specs=(
            PartitionSpec(row_axis),
            PartitionSpec(ids_axis),
            PartitionSpec(ids_axis),
            PartitionSpec(),
            PartitionSpec(),
        ),
        out_specs=PartitionSpec(row_axis),
        # Devices that hold the same rows change them alike, which JAX cannot see.
        check_vma=False,
    )(table, row_ids, gradients, learning_rate, step)
    return result


def _with_rows_updated(
    table: Table, row_ids: Any, gradients: Any, optimizer: RowOptimizer, learning_rate: Any, step: Any
) -> Table:
    """Returns the table with the rows of the batch changed, where it lies.

    Args:
        table: the table.
        row_ids: `[num_ids]` int32, the number of the table's rows or more for none.
        gradients: `[num_ids, output_dim]`.
        optimizer: what changes the rows.
        learning_rate: float32 scalar.
        step: float32 scalar.
    """
    num_rows = table.embeddings.shape[0]
    num_ids = row_ids.shape[0]
    order = jnp.argsort(row_ids)
    sorted_ids = row_ids[order]
    is_first = jnp.concatenate([jnp.ones(min(num_ids, 1), "bool"), sorted_ids[1:] != sorted_ids[:-1]])
    place = jnp.cumsum(is_first) - 1
    gradients = (
        jnp.zeros(gradients.shape, "float32").at[place].add(gradients[order].astype("float32"), indices_are_sorted=True)
    )
    # Each row once and ascending, then places out of range that differ, so that JAX may rely on both.
    unique_ids = (num_rows + jnp.arange(num_ids, dtype="int32")).at[place].set(sorted_ids, indices_are_sorted=True)

    def rows_of(array: Any) -> Any:
        return array.at[unique_ids].get(mode="fill", fill_value=0).astype("float32")

    def with_rows(array: Any, rows: Any) -> Any:
        return array.at[unique_ids].set(
            rows.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
        )

    rows, slots = optimizer.update(
        rows_of(table.embeddings),
        {name: rows_of(slot) for name, slot in table.slots.items()},
        optimizer.clip(gradients),
        learning_rate,
        step,
    )
    return Table(
        with_rows(table.embeddings, rows),
        {name: with_rows(slot, slots[name]) for name, slot in table.slots.items()},
    )


def _local_ids(row_ids: Any, num_rows: int, row_axis: str) -> Any:
    """Returns the ids as counted in this device's `num_rows` rows, `num_rows` where it has none."""
    local = row_ids - jax.lax.axis_index(row_axis) * num_rows
    return jnp.where((local >= 0) & (local < num_rows), local, num_rows)


def _ids_axis(row_ids: Any, layout: TableLayout) -> str | None:
    """Returns the mesh axis that splits the ids of a batch, `None` where they do not divide."""
    return None if row_ids.shape[0] % layout.num_batch_shards else layout.batch_axis
