"""How many scores of each query rank before some thresholds: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax
from jax import numpy as jnp

# Scores of this many rows are compared in one step of a loop. The counts stay in registers meanwhile.
TILE_ROWS = 64
# Thresholds of a query that are compared in one pass, so that all of them stay in the cache.
THRESHOLDS_IN_PASS = 32
# With fewer thresholds, a pass for each takes less time than a loop over tiles.
MIN_THRESHOLDS = 8
# Below the number of each key.
NONE = np.iinfo(np.int32).min


def to_numbers(keys: Any) -> Any:
    """Returns int32 numbers in the order of float32 keys, none of which is NaN or -0.0."""
    numbers = lax.bitcast_convert_type(keys, jnp.int32)
    return jnp.where(numbers < 0, numbers ^ np.iinfo(np.int32).max, numbers)


def counts_in_passes(keys: Any, counts: Any, thresholds: Any, own_rows: Any) -> Any:
    """Returns how many rows rank before each target: a higher key, or the same key in a lower row.

    Args:
        keys: `[num_rows, num_queries]` float32, without -0.0. NaN ranks before nothing.
        counts: `[num_rows, 1]` or `[num_rows, num_queries]` bool, which rows count.
        thresholds: `[num_targets, num_queries]` float32, the key of each target.
        own_rows: `[num_targets, num_queries]` int32, the row of each target, which may lie before or after all rows.

    Returns:
        `[num_targets, num_queries]` int32.
    """
    rows = lax.broadcasted_iota(jnp.int32, (keys.shape[0], 1), 0)

    def count(target: tuple[Any, Any]) -> Any:
        key, row = target
        before = (keys > key) | ((keys == key) & (rows < row))
        return jnp.sum(before & counts, axis=0, dtype=jnp.int32)

    if len(thresholds) == 1:
        return count((thresholds[0], own_rows[0]))[None]
    return lax.map(count, (thresholds, own_rows))


def counts_in_tiles(keys: Any, counts: Any, thresholds: Any, own_rows: Any) -> Any:
    """Returns what `counts_in_passes` does, in one pass over the keys for many thresholds.

    For CPUs, on which a pass for each threshold waits for the memory.
    """
    num_targets, num_queries = thresholds.shape
    numbers = jnp.where(counts & ~jnp.isnan(keys), to_numbers(keys), NONE)
    num_passes = -(-num_targets // THRESHOLDS_IN_PASS)
    # Passes of equal size need the least padding.
    size = -(-num_targets // num_passes)

    def to_passes(array: Any) -> Any:
        return jnp.pad(array, ((0, num_passes * size - num_targets), (0, 0))).reshape(num_passes, size, num_queries)

    targets = (to_passes(to_numbers(thresholds)), to_passes(own_rows))
    result = lax.map(lambda target: _counts(numbers, *target), targets)
    return result.reshape(-1, num_queries)[:num_targets]


def _counts(numbers: Any, thresholds: Any, own_rows: Any) -> Any:
    """Returns the counts of one pass, as `counts_in_tiles`."""
    num_rows = numbers.shape[0]

    def add_tile(result: Any, first_row: Any, size: int) -> Any:
        tile = lax.dynamic_slice_in_dim(numbers, first_row, size)
        # An equal number ranks before a target in a later tile.
        lowest = jnp.where(first_row + TILE_ROWS <= own_rows, thresholds - 1, thresholds)
        for i in range(size):
            result += (tile[i] > lowest).astype(jnp.int32)
        return result

    num_tiles, num_left = divmod(num_rows, TILE_ROWS)
    result = jnp.zeros(thresholds.shape, jnp.int32)
    if num_tiles:
        result = lax.fori_loop(0, num_tiles, lambda i, result: add_tile(result, i * TILE_ROWS, TILE_ROWS), result)
    if num_left:
        result = add_tile(result, num_tiles * TILE_ROWS, num_left)
    # Equal numbers in the tile of the target.
    first_rows = own_rows // TILE_ROWS * TILE_ROWS
    rows = first_rows[..., None] + jnp.arange(TILE_ROWS, dtype=jnp.int32)
    queries = jnp.arange(numbers.shape[1], dtype=jnp.int32)[:, None]
    in_tile = numbers.at[rows, queries].get(mode="fill", fill_value=NONE, wrap_negative_indices=False)
    return result + jnp.sum((in_tile == thresholds[..., None]) & (rows < own_rows[..., None]), axis=2, dtype=jnp.int32)
