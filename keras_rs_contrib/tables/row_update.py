"""Lookups whose gradient is the table after a step of its row optimizer: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from keras_rs_contrib.tables.layout import TableLayout
from keras_rs_contrib.tables.row_optimizers import RowOptimizer

# Up to this many rows for each id of the batch, it is faster to update all rows than to sort the ids: measured on CPUs
# for 100 to 4,096 ids, and embeddings of 16 and 64.
ROWS_PER_ID = 4


class Table(NamedTuple):
    """A table and the slots of its row optimizer.

    Attributes:
        embeddings: `[num_padded_rows, output_dim]` float.
        slots: `[num_padded_rows, width]` float32 each, by name.
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
    when_updated: Callable[[Table, Table], None],
) -> Any:
    """Returns the rows of `ids`. The gradient of the table and of each slot is its value after an optimizer step.

    The gradients of duplicate ids are summed. If an id is out of range, the step changes no row.

    Args:
        table: the table and its slots.
        ids: `[...]` ints. Negative ids count from the last row, as in NumPy.
        num_rows: number of rows of the table without padding.
        optimizer: the row optimizer.
        learning_rate: float32 scalar.
        step: float32 scalar, the number of the step, starting at 1.
        layout: layout of the table on the mesh, or `None` for a single device.
        when_differentiated: called when JAX traces the forward pass of a differentiated lookup.
        when_updated: called with the table and the table after the step when JAX traces the backward pass. If the loss
            does not depend on the lookup, JAX skips the backward pass.

    Returns:
        `[..., output_dim]`, dtype of the table; NaN for ids out of range.
    """
    row_ids = jnp.ravel(ids)
    if jnp.issubdtype(row_ids.dtype, jnp.unsignedinteger):
        # Ids above the range of int32 must not wrap around to valid rows.
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
        table, row_ids, learning_rate, step = residuals
        # An id out of range makes the loss NaN, and so all gradients of the batch. They must not reach other rows.
        any_without = jnp.any(row_ids == table.embeddings.shape[0])
        row_ids = jnp.where(any_without, table.embeddings.shape[0], row_ids)
        updated = _updated(table, row_ids, gradients, optimizer, learning_rate, step, layout)
        when_updated(table, updated)
        return updated, None, None, None

    lookup.defvjp(forward, backward)
    rows = lookup(table, row_ids, learning_rate, step)
    return jnp.reshape(rows, (*jnp.shape(ids), rows.shape[-1]))


def constant(table: Any, name: str) -> Any:
    """Returns a table or a slot through which a gradient raises `ValueError`.

    Args:
        table: `[num_padded_rows, width]` float.
        name: path of the variable, for the error message.
    """

    @jax.custom_vjp
    def identity(table: Any) -> Any:
        return table

    def backward(_: None, gradient: Any) -> Any:
        raise ValueError(
            "The gradient of the table of a `RowSparseEmbedding`, and of its slots, must come from a lookup only. "
            f"Received: a gradient for {name!r} from a computation on the table itself. Call the layer to look up "
            "rows, wrap the variable in `keras.ops.stop_gradient`, or use a `keras_rs_contrib.ShardedEmbedding`."
        )

    identity.defvjp(lambda table: (table, None), backward)
    return identity(table)


def _gathered(embeddings: Any, row_ids: Any, layout: TableLayout | None) -> Any:
    """Returns the `[num_ids, output_dim]` rows; NaN for ids out of range."""
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
        # Each device gathers the whole batch and updates its own rows, so the traffic depends only on the batch size.
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
        # Devices that hold the same rows compute the same update, but JAX cannot infer this.
        check_vma=False,
    )(table, row_ids, gradients, learning_rate, step)
    return result


def _with_rows_updated(
    table: Table, row_ids: Any, gradients: Any, optimizer: RowOptimizer, learning_rate: Any, step: Any
) -> Table:
    """Returns the table after an update of the rows in the batch. In a large table, only these are read and written.

    Args:
        table: the table and its slots.
        row_ids: `[num_ids]` int32. Ids that are not less than the number of rows are ignored.
        gradients: `[num_ids, output_dim]` float.
        optimizer: the row optimizer.
        learning_rate: float32 scalar.
        step: float32 scalar.
    """
    is_small = table.embeddings.shape[0] <= ROWS_PER_ID * row_ids.shape[0]
    rows_of, with_rows, gradients = (_all_rows if is_small else _rows_of_ids)(table, row_ids, gradients)
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


def _rows_of_ids(table: Table, row_ids: Any, gradients: Any) -> tuple[Callable[[Any], Any], Callable[..., Any], Any]:
    """Returns what reads the rows of unique ids, what writes them, and the sum of the gradients of each."""
    num_rows = table.embeddings.shape[0]
    num_ids = row_ids.shape[0]
    order = jnp.argsort(row_ids)
    sorted_ids = row_ids[order]
    is_first = jnp.concatenate([jnp.ones(min(num_ids, 1), "bool"), sorted_ids[1:] != sorted_ids[:-1]])
    place = jnp.cumsum(is_first) - 1
    sums = (
        jnp.zeros(gradients.shape, "float32").at[place].add(gradients[order].astype("float32"), indices_are_sorted=True)
    )
    # Unique, ascending row ids, followed by unique ids out of range: the scatters below rely on both properties.
    unique_ids = (num_rows + jnp.arange(num_ids, dtype="int32")).at[place].set(sorted_ids, indices_are_sorted=True)

    def rows_of(array: Any) -> Any:
        return array.at[unique_ids].get(mode="fill", fill_value=0).astype("float32")

    def with_rows(array: Any, rows: Any) -> Any:
        return array.at[unique_ids].set(
            rows.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return rows_of, with_rows, sums


def _all_rows(table: Table, row_ids: Any, gradients: Any) -> tuple[Callable[[Any], Any], Callable[..., Any], Any]:
    """Returns what `_rows_of_ids` does, for all rows, of which those of other ids are not written."""
    num_rows = table.embeddings.shape[0]
    in_batch = jnp.zeros((num_rows, 1), "bool").at[row_ids].set(True, mode="drop")
    sums = jnp.zeros((num_rows, gradients.shape[1]), "float32")
    sums = sums.at[row_ids].add(gradients.astype("float32"), mode="drop")

    def rows_of(array: Any) -> Any:
        return array.astype("float32")

    def with_rows(array: Any, rows: Any) -> Any:
        return jnp.where(in_batch, rows.astype(array.dtype), array)

    return rows_of, with_rows, sums


def _local_ids(row_ids: Any, num_rows: int, row_axis: str) -> Any:
    """Returns ids relative to the first of this device's `num_rows` rows; `num_rows` for rows of other devices."""
    local = row_ids - jax.lax.axis_index(row_axis) * num_rows
    return jnp.where((local >= 0) & (local < num_rows), local, num_rows)


def _ids_axis(row_ids: Any, layout: TableLayout) -> str | None:
    """Returns the mesh axis that splits the ids, or `None` if their number is not divisible by its size."""
    return None if row_ids.shape[0] % layout.num_batch_shards else layout.batch_axis
