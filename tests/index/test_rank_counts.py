import numpy as np
import pytest
from jax import numpy as jnp

from keras_rs_contrib.index.rank_counts import THRESHOLDS_IN_PASS, TILE_ROWS, counts_in_passes, counts_in_tiles
from keras_rs_contrib.index.score_blocks import to_keys


@pytest.mark.parametrize("num_rows", [1, TILE_ROWS - 1, TILE_ROWS, 3 * TILE_ROWS + 5])
@pytest.mark.parametrize("num_targets", [4, THRESHOLDS_IN_PASS + 1])
@pytest.mark.parametrize("has_mask", [False, True])
def test_tiles_count_as_passes_do(rng, num_rows, num_targets, has_mask):
    """With many equal keys, infinite and missing ones, and targets in other shards of the table."""
    keys = rng.integers(-3, 4, (num_rows, 7)).astype("float32")
    keys = np.where(rng.random(keys.shape) < 0.1, -np.inf, keys)
    keys = np.where(rng.random(keys.shape) < 0.1, 1e-41, keys)
    keys = np.array(to_keys(jnp.asarray(keys)))
    own_rows = rng.integers(-num_rows, 2 * num_rows, (num_targets, 7)).astype("int32")
    thresholds = np.take_along_axis(keys, np.clip(own_rows, 0, num_rows - 1), axis=0)
    keys[rng.random(keys.shape) < 0.1] = np.nan
    counts = rng.random((num_rows, 7) if has_mask else (num_rows, 1)) < 0.8

    found = counts_in_tiles(keys, counts, thresholds, own_rows)

    np.testing.assert_array_equal(found, counts_in_passes(keys, counts, thresholds, own_rows))
    rows = np.arange(num_rows)[:, None, None]
    before = (keys[:, None] > thresholds) | ((keys[:, None] == thresholds) & (rows < own_rows))
    np.testing.assert_array_equal(found, (before & counts[:, None]).sum(axis=0))
