"""Errors in a batch of features, found on the host before the model uses it: pure functions of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from keras_rs_contrib.model.id_origins import narrowest


@dataclasses.dataclass(frozen=True)
class AllowedIds:
    """The values that an id feature may have.

    Attributes:
        num_rows: number of rows of the table in which the feature is looked up: values are in [0, num_rows).
        table: name of the table, for errors.
        ids: the sorted values allowed, if they are not the rows of a table.
    """

    num_rows: int
    table: str
    ids: np.ndarray[Any, Any] | None = None


def check_numbers(batch: int, features: dict[str, Any]) -> None:
    """Raises `ValueError` if a feature is not finite, or infinite in the dtype in which JAX computes.

    Args:
        batch: the number of the batch, for the error.
        features: `[num_rows, ...]` arrays, by their description.
    """
    for name, values in features.items():
        values = np.asarray(values)
        if values.dtype.kind != "f":
            continue
        if not np.isfinite(values).all():
            place = tuple(np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"{name} must hold finite numbers. Received: {values[place]} in row {place[0]} of batch {batch}. "
                "Fill in missing values, or leave such rows out."
            )
        dtype = jax.dtypes.canonicalize_dtype(values.dtype)
        largest = np.finfo(dtype).max if dtype != values.dtype else np.inf
        if values.size and np.abs(values).max() > largest:
            place = tuple(np.argwhere(np.abs(values) > largest)[0])
            raise ValueError(
                f"{name} must be in the range of {dtype}, in which JAX computes. Received: {values[place]} in row "
                f"{place[0]} of batch {batch}. Scale the values, for instance by their standard deviation."
            )


def check_not_negative(batch: int, weights: dict[str, Any]) -> None:
    """Raises `ValueError` if a weight is negative, which would reward errors.

    Args:
        batch: the number of the batch, for the error.
        weights: `[num_rows]` arrays by their description, or `None`.
    """
    for name, values in weights.items():
        if values is not None and np.size(values) and np.min(values) < 0:
            row = int(np.argwhere(np.asarray(values) < 0)[0][0])
            raise ValueError(
                f"{name} must not be negative. Received: {np.asarray(values)[row]} in row {row} of batch {batch}. "
                "Use 0 to leave a row out."
            )


def check_range(batch: int, feature: str, values: Any, dtype: Any = None) -> None:
    """Raises `ValueError` if JAX would change an integer.

    Args:
        batch: the number of the batch, for the error.
        feature: the name of the feature.
        values: an array.
        dtype: the integer dtype to which JAX would convert it, or `None` for the default.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "iu" or not values.size:
        return
    dtype = np.dtype(dtype or jax.dtypes.canonicalize_dtype(values.dtype))
    limits = np.iinfo(dtype)
    if values.min() >= limits.min and values.max() <= limits.max:
        return
    place = tuple(np.argwhere((values < limits.min) | (values > limits.max))[0])
    raise ValueError(
        f"The feature {feature!r} must be in [{limits.min}, {limits.max}], the range of {dtype}, in which JAX "
        f"computes. Received: {values[place]} in row {place[0]} of batch {batch}. "
        "Number the values from 0, or hash them in the input pipeline."
    )


def check_rows_of_ids(batch: int, feature: str, values: Any) -> None:
    """Raises an error if rows of ids are not integers (`TypeError`), not rows, or exceed int32 (`ValueError`).

    Args:
        batch: the number of the batch, for the error.
        feature: the name of the feature.
        values: `[num_rows, m]`.
    """
    values = np.asarray(values)
    if values.size and values.dtype.kind not in "iu":
        raise TypeError(
            f"The feature {feature!r} must hold ids, as integers. Received: dtype {values.dtype} in batch {batch}. "
            "Number the candidates first."
        )
    if values.ndim != 2:
        raise ValueError(
            f"The feature {feature!r} must hold a row of ids for each query, padded with -1. Received: shape "
            f"{values.shape} in batch {batch}. Create the rows with `group_candidate_ids`."
        )
    check_range(batch, feature, values, np.int32)


def check_ids(batch: int, features: dict[str, Any], allowed: Iterable[tuple[str, AllowedIds]]) -> None:
    """Raises `ValueError` if an id is not allowed.

    Args:
        batch: the number of the batch, for the error.
        features: `[num_rows, ...]` arrays.
        allowed: pairs of the name of a feature and the values that it may have.
    """
    for name, ids in allowed:
        values = np.asarray(features[name]) if name in features else np.empty(0)
        if values.size:
            _check_ids(batch, name, values, ids)


def _check_ids(batch: int, name: str, values: np.ndarray[Any, Any], allowed: AllowedIds) -> None:
    if values.dtype.kind not in "iufb":
        raise ValueError(
            f"The feature {name!r} must hold ids, as integers. Received: dtype {values.dtype} in batch {batch}. "
            "Number them first, for instance with `keras.layers.StringLookup` in the input pipeline."
        )
    if values.dtype.kind == "f":
        # Keras converts a column of float64, such as one that pandas made of integers, without an error.
        dtype = jax.dtypes.canonicalize_dtype(values.dtype)
        _, limit = narrowest(frozenset({dtype}))
        if values.max() >= limit:
            raise ValueError(
                f"The feature {name!r} must hold ids, as integers, or as floats that hold each of them. Received: "
                f"{values.max():.0f} in batch {batch}, as {dtype}, which holds integers up to {int(limit)}. Convert "
                "the column: `.astype('int64')`."
            )
    if allowed.ids is not None:
        places = np.minimum(np.searchsorted(allowed.ids, values), len(allowed.ids) - 1)
        wrong = allowed.ids[places] != values
        rule = f"one of the {len(allowed.ids)} ids of {allowed.table}"
    else:
        # Minimum and maximum are faster than comparing each value.
        is_whole = values.dtype.kind != "f" or bool((values == np.floor(values)).all())
        if is_whole and values.min() >= 0 and values.max() < allowed.num_rows:
            return
        wrong = ~((values >= 0) & (values < allowed.num_rows) & (values == np.floor(values)))
        rule = f"a whole number in [0, {allowed.num_rows - 1}], the rows of {allowed.table}"
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        raise ValueError(
            f"The feature {name!r} must be {rule}. Received: {values[place]} in row {place[0]} of batch {batch}. "
            "Leave such rows out, or make the table larger."
        )
