"""How a table lies on the devices: the mesh, and the axes that split the queries and the rows."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import keras
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class TableLayout:
    """The mesh of a candidate table.

    Attributes:
        mesh: the devices.
        batch_axis: the mesh axis over which queries are split.
        row_axis: the mesh axis over which the table's rows are split, or `None` where each device holds them all.
    """

    mesh: Mesh
    batch_axis: str
    row_axis: str | None

    @property
    def num_batch_shards(self) -> int:
        """Over how many devices queries are split."""
        return int(self.mesh.shape[self.batch_axis])


def table_layout(table: keras.Variable) -> TableLayout | None:
    """Returns how `table` lies on the devices, or `None` where it lies on one, or not on a mesh.

    Args:
        table: `[num_candidates, embedding_dim]` variable.

    Raises:
        ValueError: if the embeddings' dimension is split.
    """
    if keras.backend.backend() != "jax":
        return None
    sharding = _sharding(table)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    spec = (*sharding.spec, None, None)
    if spec[1] is not None or isinstance(spec[0], tuple):
        raise ValueError(
            "A candidate table may be split over its rows, by one mesh axis. Received: "
            f"a table with layout {sharding.spec}. Change the layout of {table.path!r} to (axis, None)."
        )
    return TableLayout(mesh, _batch_axis(mesh), spec[0])


def check_mesh_axis(mesh_axis: str | None) -> None:
    """Raises `ValueError` where a distribution is in force whose mesh has no axis `mesh_axis`."""
    distribution = keras.distribution.distribution()
    if mesh_axis is None or distribution is None:
        return
    axis_names = list(distribution.device_mesh.axis_names)
    if mesh_axis not in axis_names:
        raise ValueError(
            f"`mesh_axis` must be an axis of the mesh in force. Received: mesh_axis={mesh_axis!r} "
            f"for a mesh with axes {axis_names}. Name one of them, or None to follow the table's own layout."
        )


def split_rows(table: keras.Variable, mesh_axis: str) -> None:
    """Splits the rows of `table` over a mesh axis of the distribution in force.

    The table stays whole without a distribution, on a mesh that lacks the axis (a model loaded on other devices), and,
    with a warning, where its rows do not divide over the axis.

    Args:
        table: `[num_candidates, embedding_dim]` variable.
        mesh_axis: the name of the axis.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or mesh_axis not in distribution.device_mesh.axis_names:
        return
    mesh = distribution.device_mesh.backend_mesh
    num_rows, num_shards = table.shape[0], int(mesh.shape[mesh_axis])
    if num_rows % num_shards:
        warnings.warn(
            "The rows of a table must divide over the mesh axis that splits them. Received: "
            f"{num_rows} rows for {num_shards} devices on axis {mesh_axis!r}, so each device holds them all. Round "
            f"their number up to {-(-num_rows // num_shards) * num_shards} and name the added ones in `exclude_ids`.",
            stacklevel=2,
        )
        return
    sharding = NamedSharding(mesh, PartitionSpec(mesh_axis, None))
    if _sharding(table) == sharding:
        return
    # Keras has no public way to change the layout of a variable. A variable made while Keras traces the model has no
    # value yet, and takes the layout with its first one.
    table._layout = sharding
    if table._value is not None:
        table.assign(table._value)


def _sharding(table: keras.Variable) -> Any:
    layout = getattr(table, "_layout", None)
    return layout.backend_layout if isinstance(layout, keras.distribution.TensorLayout) else layout


def _batch_axis(mesh: Mesh) -> str:
    distribution = keras.distribution.distribution()
    if distribution is not None and distribution.batch_dim_name in mesh.axis_names:
        return str(distribution.batch_dim_name)
    return str(mesh.axis_names[0])
