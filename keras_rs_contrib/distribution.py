"""How a table lies on the devices: the mesh, and the axes that split the queries and the rows."""

from __future__ import annotations

import dataclasses
import math
import types
import warnings
from typing import Any

import keras
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from keras.src.backend.common import global_state


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


@dataclasses.dataclass(frozen=True)
class BatchSplit:
    """The mesh that splits a batch into contiguous parts.

    Attributes:
        mesh: the devices.
        axis: the mesh axis over which batches are split.
    """

    mesh: Mesh
    axis: str

    @property
    def num_replicas(self) -> int:
        """Into how many parts."""
        return int(self.mesh.shape[self.axis])


def batch_split(num_rows: int) -> BatchSplit | None:
    """Returns how the distribution in force splits a batch of `num_rows`, or `None` where it stays whole.

    It stays whole without a distribution, on one replica, and where its rows do not divide over the replicas.
    """
    replicas = num_replicas()
    if replicas == 1 or num_rows == 0 or num_rows % replicas:
        return None
    distribution = keras.distribution.distribution()
    return BatchSplit(distribution.device_mesh.backend_mesh, str(distribution.batch_dim_name))


def num_replicas() -> int:
    """Returns over how many devices the distribution in force splits a batch, 1 without one."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh is None:
        return 1
    mesh = distribution.device_mesh
    return int(dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(distribution.batch_dim_name, 1))


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
    """Raises `ValueError` where a distribution is in force whose mesh has no axis `mesh_axis`.

    A model that is being loaded names the axis of the mesh that it was saved on, and is left alone.
    """
    distribution = keras.distribution.distribution()
    # Keras tells nobody that it is loading, but for this trace.
    is_loading = global_state.get_global_attribute("shared_objects/id_to_obj_map") is not None
    if mesh_axis is None or distribution is None or is_loading:
        return
    axis_names = list(distribution.device_mesh.axis_names)
    if mesh_axis not in axis_names:
        raise ValueError(
            f"`mesh_axis` must be an axis of the mesh in force. Received: mesh_axis={mesh_axis!r} "
            f"for a mesh with axes {axis_names}. Name one of them, or None to follow the table's own layout."
        )


def rows_on_mesh(num_rows: int, mesh_axis: str | None, path: str) -> int:
    """Returns how many rows a table has on the mesh in force, rounded up to divide over the axis that splits them.

    Args:
        num_rows: rows of the table.
        mesh_axis: the axis that is to split them, or `None` to follow the layout map of the distribution.
        path: the variable's path, by which a layout map knows it.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return num_rows
    # Keras lays the table out by its map when it makes it, whatever comes after.
    axes = {mesh_axis, _axis_of_layout_map(path)}
    mesh = distribution.device_mesh
    num_shards = math.lcm(*(size for name, size in zip(mesh.axis_names, mesh.shape, strict=True) if name in axes))
    return -(-num_rows // num_shards) * num_shards


def axis_of_rows(mesh_axis: str | None, path: str) -> str | None:
    """Returns the mesh axis that splits a table's rows once it is made; `mesh_axis` where the mesh in force has none.

    Args:
        mesh_axis: as for `rows_on_mesh`, as the path.
        path: the variable's path.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or mesh_axis in distribution.device_mesh.axis_names:
        return mesh_axis
    return _axis_of_layout_map(path) or mesh_axis


def check_divides(num_rows: int, mesh_axis: str | None, path: str) -> None:
    """Raises `ValueError` where a table that is no padded one would have to be, on the mesh in force.

    Args:
        num_rows: rows of the table.
        mesh_axis: as for `rows_on_mesh`, as the path.
        path: the variable's path.
    """
    num_rows_on_mesh = rows_on_mesh(num_rows, mesh_axis, path)
    if num_rows_on_mesh != num_rows:
        raise ValueError(
            "The rows of a table that is built already, or is not of a plain `keras.layers.Embedding`, must divide "
            f"over the mesh axis that splits them. Received: {num_rows} rows of {path!r} for mesh axis {mesh_axis!r}. "
            "Call `shard_candidates` before the tower is first used, make the tower a "
            f"`keras_rs_contrib.ShardedEmbedding`, or give it {num_rows_on_mesh} rows and name the added ones in "
            "`exclude_ids`."
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
    num_rows = getattr(table, "num_rows_on_mesh", table.shape[0])
    num_shards = int(mesh.shape[mesh_axis])
    if num_rows % num_shards:
        # A file must load everywhere, and in it the table was built before the index.
        warnings.warn(
            "The rows of a table that is built already must divide over the mesh axis that splits them. Received: "
            f"{num_rows} rows for {num_shards} devices on axis {mesh_axis!r}, so each device holds them all. "
            "Make the tower a `keras_rs_contrib.ShardedEmbedding`.",
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


def _axis_of_layout_map(path: str) -> str | None:
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.ModelParallel):
        return None
    axis: str | None = distribution.get_variable_layout(types.SimpleNamespace(path=path, shape=(1, 1))).axes[0]
    return axis


def _sharding(table: keras.Variable) -> Any:
    layout = getattr(table, "_layout", None)
    return layout.backend_layout if isinstance(layout, keras.distribution.TensorLayout) else layout


def _batch_axis(mesh: Mesh) -> str:
    distribution = keras.distribution.distribution()
    if distribution is not None and distribution.batch_dim_name in mesh.axis_names:
        return str(distribution.batch_dim_name)
    return str(mesh.axis_names[0])
