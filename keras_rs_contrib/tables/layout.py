"""Layouts of embedding tables on a device mesh."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable

import keras
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_rs_contrib import _keras
from keras_rs_contrib.distribution import axis_size, check_layout, layout_axes


@dataclasses.dataclass(frozen=True)
class TableLayout:
    """The mesh of a table, and the mesh axes that split queries and rows.

    Attributes:
        mesh: the device mesh.
        batch_axis: mesh axis that splits the queries.
        row_axis: mesh axis that splits the rows of the table, or `None` if each device holds all rows.
    """

    mesh: Mesh
    batch_axis: str
    row_axis: str | None

    @property
    def num_batch_shards(self) -> int:
        """Number of devices along `batch_axis`."""
        return int(self.mesh.shape[self.batch_axis])


def table_layout(table: keras.Variable) -> TableLayout | None:
    """Returns the layout of `table`, or `None` if it is on a single device.

    Args:
        table: `[num_rows, embedding_dim]` variable.

    Raises:
        ValueError: if the embedding dimension is split, or if several mesh axes split the rows.
    """
    if keras.backend.backend() != "jax":
        return None
    sharding = _keras.get_layout(table)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    spec = (*sharding.spec, None, None)
    if spec[1] is not None or isinstance(spec[0], tuple):
        raise ValueError(
            "A candidate table must be split over its rows only, and by one mesh axis. Received: "
            f"a table with layout {sharding.spec}. Change the layout of {table.path!r} to (axis, None)."
        )
    return TableLayout(mesh, _batch_axis(mesh), spec[0])


def check_mesh_axis(mesh_axis: str | None) -> None:
    """Raises `ValueError` if the mesh in force has no axis `mesh_axis`.

    Nothing is checked while Keras loads a file, because a saved axis may belong to another mesh.
    """
    distribution = keras.distribution.distribution()
    if mesh_axis is None or distribution is None or _keras.is_loading():
        return
    axis_names = list(distribution.device_mesh.axis_names)
    if mesh_axis not in axis_names:
        raise ValueError(
            f"`mesh_axis` must be an axis of the mesh in force. Received: mesh_axis={mesh_axis!r} "
            f"for a mesh with axes {axis_names}. Pass one of these axes, or None to keep the table's own layout."
        )


def axis_of_rows(mesh_axis: str | None, path: str) -> str | None:
    """Returns the axis of the mesh in force that splits the rows of a table, or `None` if no axis does.

    Args:
        mesh_axis: the requested axis. If it is `None`, or not an axis of the mesh, the layout map decides.
        path: path of the variable, for the layout map.
    """
    if has_axis(mesh_axis):
        return mesh_axis
    axis: str | None = next(iter(layout_axes(path, (1, 1))), None)
    return axis


def has_axis(mesh_axis: str | None) -> bool:
    """Returns whether the mesh in force has an axis, which then splits the rows whatever the layout map says."""
    distribution = keras.distribution.distribution()
    return distribution is not None and mesh_axis in distribution.device_mesh.axis_names


def row_sharding(axis: str | None) -> NamedSharding:
    """Returns the sharding that splits the rows of a table over an axis of the mesh in force, or over none."""
    return NamedSharding(keras.distribution.distribution().device_mesh.backend_mesh, PartitionSpec(axis, None))


def row_layout(axis: str | None) -> dict[str, NamedSharding]:
    """Returns the argument `layout` of a variable whose rows an axis splits; nothing without a distribution."""
    return {} if keras.distribution.distribution() is None else {"layout": row_sharding(axis)}


def split_rows(table: keras.Variable, mesh_axis: str) -> None:
    """Splits the rows of an existing table over an axis of the mesh in force, if the mesh has that axis.

    A file must load on any mesh. While Keras loads one, an indivisible number of rows is therefore only a warning, and
    each device holds the whole table.

    Args:
        table: `[num_rows, embedding_dim]` variable.
        mesh_axis: name of the mesh axis.

    Raises:
        ValueError: if `num_rows` is not divisible by the size of the axis.
    """
    if not has_axis(mesh_axis):
        return
    sharding = row_sharding(mesh_axis)
    if _keras.get_layout(table) == sharding:
        return
    try:
        check_rows_divide(table.shape[0], mesh_axis, table.path)
    except ValueError as error:
        if not _keras.is_loading():
            raise
        warnings.warn(f"Each device holds the whole table. {error}", stacklevel=2)
        return
    _keras.set_layout(table, sharding)


def check_rows_divide(num_rows: int, axis: str | None, path: str) -> None:
    """Raises `ValueError` if the number of rows of a table is not divisible by the size of a mesh axis.

    Args:
        num_rows: number of rows of the table.
        axis: axis of the mesh in force that splits the rows, or `None`.
        path: path of the variable, for the error message.
    """
    if num_rows % axis_size(axis):
        raise ValueError(
            "The number of rows of a table must be divisible by the size of the mesh axis that splits them. Received: "
            f"{num_rows} rows of {path!r} for {axis_size(axis)} devices on mesh axis {axis!r}. "
            "Use a `keras_rs_contrib.ShardedEmbedding`, which pads its rows to a multiple of `row_multiple`."
        )


def check_layouts(variables: Iterable[keras.Variable]) -> None:
    """Raises `ValueError` if the mesh in force cannot hold one of the variables, which have no value yet.

    For a plain embedding whose rows do not divide, the error recommends a `ShardedEmbedding`.
    """
    for variable in variables:
        sharding = _keras.get_layout(variable)
        axes = layout_axes(variable.path, variable.shape) if sharding is None else tuple(sharding.spec)
        if variable.name == "embeddings" and variable.trainable and axes:
            check_rows_divide(variable.shape[0], axes[0], variable.path)
        check_layout(variable.path, variable.shape, axes)


def _batch_axis(mesh: Mesh) -> str:
    distribution = keras.distribution.distribution()
    if distribution is not None and distribution.batch_dim_name in mesh.axis_names:
        return str(distribution.batch_dim_name)
    return str(mesh.axis_names[0])
