"""The distribution in force: how many replicas it has, and how it splits a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

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
        sharding = getattr(variable.value, "sharding", None) if _keras.has_value(variable) else None
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and sharding.mesh != mesh:
            raise ValueError(
                "A model must be used under the distribution under which it was created. Received: "
                f"{variable.path!r} on the mesh {dict(sharding.mesh.shape)}, and a distribution over "
                f"{dict(mesh.shape)} of {mesh.size} devices. Set the distribution before creating or loading the "
                "model; `save` and `load_model` move a model to another one."
            )
