"""The common sizes at which an index is searched, and the results at them."""

import jax
import keras
import keras_rs
import numpy as np
import pytest
from conftest import compilations

from keras_rs_contrib import shard_candidates
from keras_rs_contrib.index import sizes

NUM_CANDIDATES = 97


@pytest.mark.parametrize("number", [*range(70), 96, 97, 500, 2100, 4096, 4097, 10_000])
def test_queries_are_cut_into_parts_with_little_padding(number):
    parts = sizes.parts(number, 4096)
    assert sum(size for size, _ in parts) == number
    assert all(size <= padded and padded & (padded - 1) == 0 for size, padded in parts)
    assert all(size == padded for size, padded in parts[:-1])
    assert max(padded for _, padded in parts) <= 4096
    if number > 64:
        assert sum(padded for _, padded in parts) <= 4 / 3 * number


def test_few_queries_at_once_are_a_power_of_two():
    assert sizes.parts(10, 3) == [(2, 2)] * 4 + [(2, 2)]


def test_sizes_up_to_a_number_are_those_of_all_smaller_numbers():
    for least in (1, 8):
        for number in range(100):
            expected = sorted({sizes.common_size(i, least) for i in range(1, number + 1)})
            assert sizes.sizes_up_to(number, least) == expected


def make_index(k=5, **arguments):
    tower = keras.layers.Embedding(NUM_CANDIDATES, 4)
    tower.build()
    return shard_candidates(keras_rs.layers.BruteForceRetrieval(k=k), tower, **arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"exclude_ids": [0]}, {"candidate_ids": np.arange(NUM_CANDIDATES)[::-1] * 3}]
)
def test_results_at_any_size_are_those_of_single_queries(rng, arguments):
    index = make_index(**arguments)
    index(np.zeros((1, 4), "float32"))
    for num_queries, num_excluded in [(0, 0), (0, 3), (1, 1), (3, 0), (5, 9), (9, 17)]:
        queries = rng.standard_normal((num_queries, 4)).astype("float32")
        excluded = rng.integers(-1, NUM_CANDIDATES, (num_queries, num_excluded))
        scores, ids = index(queries, exclude_ids=excluded)
        assert scores.shape == ids.shape == (num_queries, 5)
        found_scores, found_ids = index.find(queries, 7, exclude_ids=excluded)
        assert found_scores.shape == (num_queries, 7)
        ranks = index.ranks(queries, found_ids[:, :3], exclude_ids=excluded)
        np.testing.assert_array_equal(ranks, np.broadcast_to(np.arange(3), (num_queries, 3)))
        for i in range(num_queries):
            one = index.find(queries[i : i + 1], 7, exclude_ids=excluded[i : i + 1])
            np.testing.assert_allclose(found_scores[i : i + 1], one[0], rtol=1e-6)
            np.testing.assert_array_equal(found_ids[i : i + 1], one[1])
            np.testing.assert_array_equal(ids[i], one[1][0, :5])


def test_requests_of_any_size_share_few_programs(rng):
    index = make_index()

    def request(num_queries, num_excluded, num_included, k):
        queries = rng.standard_normal((num_queries, 4)).astype("float32")
        excluded = rng.integers(0, NUM_CANDIDATES, (num_queries, num_excluded))
        included = rng.integers(0, NUM_CANDIDATES, num_included)
        index(queries, exclude_ids=excluded)
        index(jax.device_put(queries), include_ids=included)
        index.find(queries, k, exclude_ids=excluded, include_ids=included)
        index.ranks(queries, excluded, include_mask=np.arange(NUM_CANDIDATES) >= num_included)

    request(8, 8, 8, 16)
    with compilations() as found:
        for num_queries, num_excluded, num_included, k in [(5, 6, 7, 9), (7, 5, 5, 3), (6, 7, 6, 16)]:
            request(num_queries, num_excluded, num_included, k)
    assert not found


def test_a_compiled_function_searches_at_its_own_size(rng):
    index = make_index()
    queries = rng.standard_normal((3, 4)).astype("float32")
    expected = index(queries)
    for found, each in zip(jax.jit(index)(queries), expected, strict=True):
        np.testing.assert_allclose(found, each, rtol=1e-6)
    for found, each in zip(jax.jit(lambda: index(queries))(), expected, strict=True):
        np.testing.assert_allclose(found, each, rtol=1e-6)
