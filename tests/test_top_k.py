import re

import jax
import numpy as np
import pytest
import reference
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_rs_contrib import top_k
from keras_rs_contrib.distribution import TableLayout

# Mesh shape, mesh axes, and the axis that splits the rows of the table.
LAYOUTS = {
    "replicated": ((8,), ("batch",), None),
    "rows over the batch axis": ((8,), ("batch",), "batch"),
    "rows over the batch axis of 2": ((2,), ("batch",), "batch"),
    "rows over the other axis": ((2, 4), ("batch", "model"), "model"),
    "rows over the batch axis of two": ((2, 4), ("batch", "model"), "batch"),
    "replicated on two axes": ((2, 4), ("batch", "model"), None),
    "5 shards": ((1, 5), ("batch", "model"), "model"),
}


def layout_of(name):
    shape, axes, row_axis = LAYOUTS[name]
    return TableLayout(Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), axes), axes[0], row_axis)


def placed(layout, queries, table):
    return (
        jax.device_put(queries, NamedSharding(layout.mesh, PartitionSpec(layout.batch_axis, None))),
        jax.device_put(table, NamedSharding(layout.mesh, PartitionSpec(layout.row_axis, None))),
    )


def small_integers(rng, *shape):
    """Values whose scores are exact in any order of summation, and often equal."""
    return rng.integers(-2, 3, shape).astype("float32")


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k_is_that_of_a_sort(rng, k, similarity):
    queries, table = rng.normal(size=(7, 4)), rng.normal(size=(40, 4))
    expected_scores, expected_rows = reference.top_k(queries, table, k, similarity=similarity)
    scores, rows = top_k.top_k(queries, table, k, similarity)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("k", [1, 7, 40])
def test_ties_rank_by_lower_row_on_any_number_of_shards(rng, name, k):
    layout = layout_of(name)
    queries, table = small_integers(rng, 8, 3), small_integers(rng, 40, 3)
    expected_scores, expected_rows = reference.top_k(queries, table, k)
    scores, rows = top_k.distributed_top_k(*placed(layout, queries, table), k, layout)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert scores.sharding.spec[0] == layout.batch_axis


@pytest.mark.parametrize("num_rows", [4, 40_000])
def test_negative_zero_ties_with_zero(num_rows):
    """A product with a negative factor gives -0.0, which XLA's top-k would put below 0.0 in either of its forms."""
    table = np.zeros((num_rows, 1), "float32")
    table[0] = -0.0
    for query in (1.0, -1.0):
        _, rows = top_k.top_k(np.array([[query]], "float32"), table, 3)
        np.testing.assert_array_equal(rows, [[0, 1, 2]])


@pytest.mark.parametrize("name", LAYOUTS)
def test_excluded_rows_are_left_out(rng, name):
    layout = layout_of(name)
    queries, table = small_integers(rng, 8, 3), small_integers(rng, 40, 3)
    excluded = rng.random(40) < 0.5
    expected_scores, expected_rows = reference.top_k(queries, table, 5, exclude_ids=np.flatnonzero(excluded))
    scores, rows = top_k.distributed_top_k(*placed(layout, queries, table), 5, layout, excluded=excluded)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("num_queries", [1, 3, 9])
def test_queries_need_not_divide_over_the_devices(rng, num_queries):
    layout = layout_of("rows over the other axis")
    queries, table = small_integers(rng, num_queries, 3), small_integers(rng, 40, 3)
    _, rows = top_k.distributed_top_k(queries, table, 5, layout)
    np.testing.assert_array_equal(rows, reference.top_k(queries, table, 5)[1])


def collectives(name):
    """Shapes of what travels between the devices, as `(operation, [dimensions])`."""
    layout = layout_of(name)
    queries, table = placed(layout, np.ones((32, 16), "float32"), np.ones((4000, 16), "float32"))
    text = top_k.distributed_top_k.lower(queries, table, 5, layout).compile().as_text()
    text = re.sub(r"/\*.*?\*/", "", text)
    operations = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = re.findall(rf"= (\(?[^=]*?\)?) ({operations})(?:-start)?\(", text)
    return [
        (operation, [int(n) for n in dims.split(",") if n])
        for shapes, operation in found
        for dims in re.findall(r"\w\d+\[([\d,]*)\]", shapes)
    ]


@pytest.mark.parametrize("name", ["replicated", "replicated on two axes"])
def test_a_replicated_table_needs_no_traffic(name):
    assert collectives(name) == []


@pytest.mark.parametrize("name", ["rows over the other axis", "5 shards"])
def test_only_k_pairs_a_query_and_shard_travel(name):
    shape, _, _ = LAYOUTS[name]
    queries_a_device, num_shards = 32 // shape[0], shape[1]
    found = collectives(name)
    assert found
    for operation, dims in found:
        assert operation == "all-gather"
        assert np.prod(dims) <= queries_a_device * num_shards * 5


def test_one_axis_for_queries_and_rows_moves_queries_and_pairs_alone():
    found = collectives("rows over the batch axis")
    assert {operation for operation, _ in found} == {"all-gather", "all-to-all"}
    assert [dims for operation, dims in found if operation == "all-gather"] == [[32, 16]]
    for operation, dims in found:
        if operation == "all-to-all":
            assert np.prod(dims) <= 32 * 5
