"""What travels between the devices of a mesh while a table is searched."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from keras import ops

from keras_rs_contrib import processes
from keras_rs_contrib.tables.layout import TableLayout


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The collectives of one device. They do nothing if each device holds the whole table.

    Attributes:
        layout: the layout of the table on the mesh, or `None` on a single device.
    """

    layout: TableLayout | None

    @property
    def row_axis(self) -> str | None:
        """The mesh axis that splits the rows, or `None`."""
        return None if self.layout is None else self.layout.row_axis

    @property
    def num_shards(self) -> int:
        """The number of devices over which the rows are split."""
        return 1 if self.row_axis is None else int(self.layout.mesh.shape[self.row_axis])  # type: ignore[union-attr]

    @property
    def _gathers_queries(self) -> bool:
        return self.row_axis is not None and self.row_axis == self.layout.batch_axis  # type: ignore[union-attr]

    def first_row(self, num_rows: int) -> Any:
        """Returns the row of the table at which this device's `num_rows` rows begin."""
        return 0 if self.row_axis is None else lax.axis_index(self.row_axis).astype(jnp.int32) * num_rows

    def all_queries(self, array: Any) -> Any:
        """Returns the rows of `array` for all queries that this device scores with its rows."""
        if array is None or not self._gathers_queries:
            return array
        return lax.all_gather(array, self.row_axis, axis=0, tiled=True)

    def own_queries(self, array: Any) -> Any:
        """Returns what all shards found for this device's queries, side by side in the order of the shards."""
        if self._gathers_queries:
            return lax.all_to_all(array, self.row_axis, split_axis=0, concat_axis=1, tiled=True)
        return lax.all_gather(array, self.row_axis, axis=1, tiled=True)

    def maximum(self, array: Any) -> Any:
        """Returns the elementwise maximum over the shards."""
        return array if self.row_axis is None else lax.pmax(array, self.row_axis)

    def total(self, array: Any) -> Any:
        """Returns the elementwise sum over the shards for this device's queries, `[num_queries, ...]`."""
        if self._gathers_queries:
            return lax.psum_scatter(array, self.row_axis, tiled=True)
        return array if self.row_axis is None else lax.psum(array, self.row_axis)


def on_shards(function: Callable[..., Any], layout: TableLayout | None, *arrays: tuple[str, Any]) -> Any:
    """Returns the result of `function`, run on every device with its part of the arrays.

    Args:
        function: takes an `Exchange` and the parts; returns arrays with a row for each query of the device.
        layout: the layout of the table, or `None` on a single device.
        *arrays: pairs of what splits an array's rows, `"queries"`, `"table"` or `"nothing"`, and the array, or `None`.
            The rows of a `"pairs"` array belong to queries, and its columns to rows of the table: each device gets the
            rows of all queries that it scores.
    """
    if layout is None:
        return function(Exchange(None), *(array for _, array in arrays))
    query_axis = None if layout.row_axis == layout.batch_axis else layout.batch_axis
    axes = {
        "queries": PartitionSpec(layout.batch_axis),
        "table": PartitionSpec(layout.row_axis),
        "pairs": PartitionSpec(query_axis, layout.row_axis),
        "nothing": PartitionSpec(),
    }
    num_queries = arrays[0][1].shape[0]
    # Keras feeds batches that divide over the devices; a layer that is called directly may see others.
    padding = -num_queries % layout.num_batch_shards

    def padded(array: Any) -> Any:
        return jnp.pad(array, ((0, padding), *[(0, 0)] * (array.ndim - 1)))

    result = jax.shard_map(
        functools.partial(function, Exchange(layout)),
        mesh=layout.mesh,
        in_specs=tuple(axes[split] for split, _ in arrays),
        out_specs=PartitionSpec(layout.batch_axis),
        # After an exchange all shards of the row axis hold the same values, which JAX cannot see.
        check_vma=False,
    )(*(jax.tree.map(padded, array) if split in ("queries", "pairs") and padding else array for split, array in arrays))
    return jax.tree.map(lambda array: array[:num_queries], result)


def gather_rows(table: Any, rows: Any, layout: TableLayout | None) -> Any:
    """Returns some rows of a table, on every device.

    Args:
        table: `[num_rows, embedding_dim]`, laid out as `layout` says.
        rows: `[n]` int32, in [0, num_rows).
        layout: the layout of the table on a mesh, or `None` on a single device.

    Returns:
        `[n, embedding_dim]`, dtype of `table`.
    """
    if layout is None or layout.row_axis is None:
        return ops.take(table, rows, axis=0)

    def gather(rows: Any, shard: Any) -> Any:
        own_rows = rows - Exchange(layout).first_row(shard.shape[0])
        is_own = (own_rows >= 0) & (own_rows < shard.shape[0])
        found = jnp.take(shard, own_rows, axis=0, mode="clip")
        # Exact: each row is a sum of itself and zeros.
        return lax.psum(jnp.where(is_own[:, None], found, 0), layout.row_axis)

    return jax.shard_map(
        gather,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(), PartitionSpec(layout.row_axis)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(rows, table)


def on_mesh(array: Any, layout: TableLayout | None) -> Any:
    """Returns `array` replicated over the devices of the mesh, which it may not be on yet.

    Args:
        array: array of any shape, concrete or traced, or `None`.
        layout: names the mesh; with `None`, the array stays where it is.
    """
    if array is None or layout is None or isinstance(array, jax.core.Tracer):
        return array
    if processes.num_processes() > 1 and getattr(array, "is_fully_addressable", True):
        return processes.on_all_devices(array)
    return jax.device_put(array, NamedSharding(layout.mesh, PartitionSpec()))
