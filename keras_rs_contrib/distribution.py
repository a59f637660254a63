"""The distribution in force: how many replicas it has, and how it splits a batch and variables."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from typing import Any

import keras
from jax.sharding import Mesh, NamedSharding

from keras_rs_contrib import _keras


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
        """The number of parts."""
        return int(self.mesh.shape[self.axis])


def batch_split(num_rows: int) -> BatchSplit | None:
    """Returns how the distribution in force splits a batch of `num_rows`, or `None` if it does not split it.

    A batch stays whole without a distribution, on one replica, and if its rows do not divide over the replicas.
    """
    replicas = num_replicas()
    if replicas == 1 or num_rows == 0 or num_rows % replicas:
        return None
    distribution = keras.distribution.distribution()
    return BatchSplit(distribution.device_mesh.backend_mesh, str(distribution.batch_dim_name))


def num_replicas() -> int:
    """Returns over how many devices the distribution in force splits a batch, 1 without a distribution."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh is None:
        return 1
    return axis_size(distribution.batch_dim_name)


def axis_size(axis: str | None) -> int:
    """Returns the number of devices along an axis of the mesh in force; 1 for `None`, or if the mesh lacks the axis."""
    if axis is None:
        return 1
    mesh = keras.distribution.distribution().device_mesh
    return int(dict(zip(mesh.axis_names, mesh.shape, strict=True)).get(axis, 1))


def check_mesh(variables: Iterable[keras.Variable]) -> None:
    """Raises `ValueError` if variables were created under another distribution than the one in force."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh is None:
        return
    mesh = distribution.device_mesh.backend_mesh
    for variable in variables:
        sharding = _keras.get_layout(variable)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and sharding.mesh != mesh:
            raise ValueError(
                "A model must be used under the distribution under which it was created. Received: "
                f"{variable.path!r} on the mesh {dict(sharding.mesh.shape)}, and a distribution over "
                f"{dict(mesh.shape)} of {mesh.size} devices. Set the distribution before creating or loading the "
                "model; `save` and `load_model` move a model to another one."
            )


def layout_axes(path: str, shape: tuple[Any, ...]) -> tuple[str | None, ...]:
    """Returns the mesh axes that the layout map in force splits a variable over; none without a layout map.

    Args:
        path: path of the variable.
        shape: shape of the variable.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.ModelParallel):
        return ()
    return tuple(distribution.get_variable_layout(types.SimpleNamespace(path=path, shape=shape)).axes)


def check_layout(path: str, shape: tuple[Any, ...], axes: tuple[str | None, ...] | None = None) -> None:
    """Raises `ValueError` if a variable is split in a way that its shape does not permit.

    JAX would raise its error while Keras creates the variable, in the middle of a build.

    Args:
        path: path of the variable.
        shape: shape of the variable.
        axes: axes of the mesh in force that split the variable. `None` for those of the layout map.
    """
    axes = layout_axes(path, shape) if axes is None else axes
    if len(axes) > len(shape):
        raise ValueError(
            "The layout of a variable must have at most as many axes as its shape. Received: "
            f"layout {axes} for {path!r} of shape {tuple(shape)}. Change the layout map, or give the variable a name "
            "that its pattern does not match."
        )
    for size, axis in zip(shape, axes, strict=False):
        if size % axis_size(axis):
            raise ValueError(
                "Each dimension of a variable must be divisible by the size of the mesh axis that splits it. Received: "
                f"shape {tuple(shape)} of {path!r} with layout {axes}, for {axis_size(axis)} devices on mesh axis "
                f"{axis!r}. Change the layout map, or choose sizes that divide."
            )
