"""The dtype policies that a table may have."""

from __future__ import annotations

from typing import Any

import keras

# Row optimizers compute in float32, and rows are rounded to one of these.
TRAINABLE_DTYPES = ("float16", "bfloat16", "float32")


def check_policy(layer: keras.layers.Layer, policy: Any, is_trained_by_row: bool) -> None:
    """Raises `ValueError` if a layer with a padded table cannot follow a dtype policy.

    Args:
        layer: the layer that owns the table.
        policy: a `keras.DTypePolicy`. A `DTypePolicyMap` has a policy for each path: before the layer is built, and has
            a path, one that it can follow is enough.
        is_trained_by_row: whether a row optimizer trains the table.
    """
    policies = [policy]
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policies = [policy[layer.path]] if layer.path else [policy.default_policy, *policy.values()]
    errors = [_error(layer, each, is_trained_by_row) for each in policies]
    if all(errors):
        raise ValueError(errors[0])


def quantization_message(layer: keras.layers.Layer, received: str) -> str:
    """Returns the message of an error that a padded table cannot be quantized.

    Args:
        layer: the layer that owns the table.
        received: what asked for quantization.
    """
    return (
        f"A `{type(layer).__name__}` cannot be quantized. Received: {received} for {layer.name!r}. To quantize its "
        "table, copy it: `keras.layers.Embedding(input_dim, output_dim, weights=layer.embeddings[:input_dim])`."
    )


def _error(layer: keras.layers.Layer, policy: Any, is_trained_by_row: bool) -> str:
    """Returns what is wrong with a policy, or an empty string."""
    if policy.quantization_mode is not None:
        return quantization_message(layer, f"the dtype policy {policy.name!r}")
    dtypes = {policy.variable_dtype, policy.compute_dtype}
    if is_trained_by_row and not dtypes.issubset(TRAINABLE_DTYPES):
        return (
            f"The dtype of a `{type(layer).__name__}`, whose rows are trained in float32, must be float16, bfloat16 or "
            f"float32. Received: the dtype policy {policy.name!r} for {layer.name!r}. Pass one of them, or a mixed "
            "precision policy, as `dtype`."
        )
    return ""
