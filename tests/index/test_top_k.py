import functools
import os
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import reference
from conftest import first_devices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_rs_contrib.index import score_blocks
from keras_rs_contrib.index import top_k as searches
from keras_rs_contrib.index.ranks import ranks as exact_ranks
from keras_rs_contrib.index.score_blocks import Search
from keras_rs_contrib.scores import SIMILARITIES
from keras_rs_contrib.tables.layout import TableLayout

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
    return TableLayout(Mesh(np.array(first_devices(np.prod(shape))).reshape(shape), axes), axes[0], row_axis)


def layout_of_shards(num_shards, over_batch_axis):
    if num_shards == 1:
        return None
    devices = np.array(first_devices(num_shards))
    if over_batch_axis:
        return TableLayout(Mesh(devices, ("batch",)), "batch", "batch")
    return TableLayout(Mesh(devices.reshape(1, num_shards), ("batch", "model")), "batch", "model")


def placed(layout, queries, table):
    return (
        jax.device_put(queries, NamedSharding(layout.mesh, PartitionSpec(layout.batch_axis, None))),
        jax.device_put(table, NamedSharding(layout.mesh, PartitionSpec(layout.row_axis, None))),
    )


def padded(table, num_shards, value=7.0):
    """Returns a table padded for a mesh. The padding rows would often win if the search included them."""
    return np.pad(table, ((0, -len(table) % num_shards), (0, 0)), constant_values=value)


def small_integers(rng, *shape):
    """Returns values whose scores are exact in any order of summation, and often equal."""
    return rng.integers(-2, 3, shape).astype("float32")


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k_matches_a_sort(rng, k, similarity):
    queries, table = rng.normal(size=(7, 4)), rng.normal(size=(40, 4))
    expected_scores, expected_ids = reference.top_k(queries, table, k, similarity=similarity)
    scores, ids = searches.top_k(queries, table, k, Search(40, similarity))
    assert (scores.dtype, ids.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("k", "name"),
    [*((7, name) for name in LAYOUTS), (1, "5 shards"), (40, "5 shards"), (40, "rows over the batch axis")],
)
def test_ties_rank_by_lower_row_on_any_number_of_shards(rng, name, k):
    layout = layout_of(name)
    queries, table = small_integers(rng, 8, 3), small_integers(rng, 40, 3)
    expected_scores, expected_ids = reference.top_k(queries, table, k)
    scores, ids = searches.top_k(*placed(layout, queries, table), k, Search(40, layout=layout))
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert scores.sharding.spec[0] == layout.batch_axis


# The search has one level for 4 rows, and two for 70,000.
@pytest.mark.parametrize("num_rows", [4, 70_000])
def test_negative_zero_ties_with_zero(num_rows):
    """A product with a negative factor gives -0.0, which XLA's top-k would rank below 0.0."""
    table = np.zeros((num_rows, 1), "float32")
    table[0] = -0.0
    for query in (1.0, -1.0):
        _, ids = searches.top_k(np.array([[query]], "float32"), table, 3, Search(num_rows))
        np.testing.assert_array_equal(ids, [[0, 1, 2]])


@pytest.mark.parametrize("name", LAYOUTS)
def test_excluded_rows_are_not_returned(rng, name):
    layout = layout_of(name)
    queries, table = small_integers(rng, 8, 3), small_integers(rng, 40, 3)
    excluded = rng.random(40) < 0.5
    expected_scores, expected_ids = reference.top_k(queries, table, 5, exclude_ids=np.flatnonzero(excluded))
    scores, ids = searches.top_k(*placed(layout, queries, table), 5, Search(40, layout=layout), excluded=excluded)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("num_queries", [1, 3, 9])
def test_the_number_of_queries_need_not_be_divisible_by_the_devices(rng, num_queries):
    layout = layout_of("rows over the other axis")
    queries, table = small_integers(rng, num_queries, 3), small_integers(rng, 40, 3)
    exclude_ids = rng.integers(-1, 40, (num_queries, 3)).astype("int32")
    search = Search(40, layout=layout)
    _, ids = searches.top_k(queries, table, 5, search, exclude_ids=exclude_ids)
    np.testing.assert_array_equal(ids, reference.top_k(queries, table, 5, exclude_ids_by_query=exclude_ids)[1])
    ranks = exact_ranks(queries, table, ids[:, 2], search, exclude_rows=exclude_ids)
    np.testing.assert_array_equal(ranks, [2] * num_queries)


# Random cases, compared with the reference.


def embeddings(values):
    return st.tuples(st.integers(1, 9), st.integers(1, 60), st.integers(1, 3)).flatmap(
        lambda sizes: st.tuples(
            *(
                st.lists(st.lists(values, min_size=sizes[2], max_size=sizes[2]), min_size=n, max_size=n).map(
                    functools.partial(np.array, dtype="float32")
                )
                for n in sizes[:2]
            )
        )
    )


# Few values, so that scores are exact and often equal. With infinities, some scores are -inf or NaN.
FINITE, INFINITE = st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0]), st.sampled_from([-np.inf, -1.0, 0.0, 1.0, np.inf])


@st.composite
def cases(draw, values):
    queries, table = draw(embeddings(values))
    num_candidates = len(table)
    ids = draw(st.one_of(st.none(), st.permutations(range(5, 5 + num_candidates))))
    known = list(range(num_candidates)) if ids is None else ids
    if draw(st.booleans()):
        exclude_ids = None
    else:
        # Duplicates, unknown ids, -1, and sometimes all candidates.
        choices = st.sampled_from([*known, -1, 10_000])
        width = draw(st.integers(0, 4))
        rows = st.one_of(st.lists(choices, min_size=width, max_size=width))
        exclude_ids = np.array([draw(rows) for _ in queries], "int32").reshape(len(queries), width)
        if draw(st.booleans()):
            exclude_ids = np.concatenate([exclude_ids, np.tile(np.array(known, "int32"), (len(queries), 1))], axis=1)
    k = draw(st.sampled_from([1, min(7, num_candidates), num_candidates]))
    return queries, table, k, ids, exclude_ids


def check_against_the_reference(case, num_shards, over_batch_axis, block_size, excluded_rows=None):
    queries, table, k, ids, exclude_ids = case
    num_candidates = len(table)
    known = np.arange(num_candidates, dtype="int32") if ids is None else np.array(ids, "int32")
    excluded = None
    if excluded_rows is not None:
        excluded = padded(excluded_rows[:, None], num_shards, True)[:, 0]
    left_out = set() if excluded_rows is None else set(known[excluded_rows].tolist())
    arguments = {"ids": known.tolist(), "exclude_ids": left_out, "exclude_ids_by_query": exclude_ids}
    search = Search(num_candidates, block_size=block_size, layout=layout_of_shards(num_shards, over_batch_axis))
    on_mesh = padded(table, num_shards)
    candidate_ids = None if ids is None else known
    scores, found = searches.top_k(queries, on_mesh, k, search, candidate_ids, exclude_ids, excluded)
    expected_scores, expected_ids = reference.top_k(queries, table, k, **arguments)
    np.testing.assert_array_equal(found, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    targets = np.arange(len(queries)) % num_candidates
    exclude_rows = None
    if exclude_ids is not None:
        row_of = {candidate_id: row for row, candidate_id in enumerate(known.tolist())}
        exclude_rows = np.vectorize(lambda i: row_of.get(i, -1), otypes=["int32"])(exclude_ids)
        # The caller handles the ranks of excluded candidates.
        keep = ~(exclude_rows == targets[:, None]).any(axis=1)
    else:
        keep = np.ones(len(queries), bool)
    if excluded_rows is not None:
        keep &= ~excluded_rows[targets]
    ranks = exact_ranks(queries, on_mesh, targets.astype("int32"), search, exclude_rows, excluded)
    expected_ranks = np.array(reference.ranks(queries, table, known[targets].tolist(), **arguments))
    np.testing.assert_array_equal(np.asarray(ranks)[keep], expected_ranks[keep])
    # Many targets are counted together.
    many = np.repeat(targets[:, None].astype("int32"), 9, axis=1)
    many_ranks = exact_ranks(queries, on_mesh, many, search, exclude_rows, excluded)
    np.testing.assert_array_equal(many_ranks, np.repeat(np.asarray(ranks)[:, None], 9, axis=1))


RANDOM = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize(
    ("values", "num_shards", "over_batch_axis"),
    [(FINITE, 1, False), (INFINITE, 1, False), (INFINITE, 3, False), (FINITE, 5, True)],
    ids=["1, finite", "1, infinite", "3, infinite", "5, finite"],
)
def test_top_k_and_ranks_match_a_sort(values, num_shards, over_batch_axis):
    @RANDOM
    @given(cases(values), st.sampled_from([1, 100, 2**26]))
    def check(case, block_size):
        check_against_the_reference(case, num_shards, over_batch_axis, block_size)

    check()


@pytest.mark.parametrize("num_shards", [1, 3])
def test_top_k_and_ranks_with_excluded_rows_match_a_sort(num_shards):
    @RANDOM
    @given(cases(INFINITE), st.integers(0, 2**32 - 1))
    def check(case, seed):
        excluded = np.random.default_rng(seed).random(len(case[1])) < 0.4
        check_against_the_reference(case, num_shards, False, 2**26, excluded)

    check()


@pytest.mark.parametrize(("k", "num_shards", "num_rows"), [(1, 3, 2_999), (10, 1, 2_999), (60, 3, 5_000)])
@pytest.mark.parametrize("with_nan", [False, True])
def test_the_two_level_search_matches_a_sort(rng, num_rows, num_shards, k, with_nan):
    """Covers full groups, rows after the last full group, many ties, and the branch for NaN scores."""
    queries, table = small_integers(rng, 70, 3), small_integers(rng, num_rows, 3)
    queries[1] = 0.0
    if with_nan:
        table[rng.choice(num_rows, 200, replace=False), 1] = np.inf
    with np.errstate(invalid="ignore"):
        keys = queries.astype("float64") @ table.T.astype("float64")
    keys = np.where(np.isnan(keys), -np.inf, keys)
    expected = np.argsort(-keys, axis=1, kind="stable")[:, :k]
    search = Search(num_rows, layout=layout_of_shards(num_shards, False))
    on_mesh = padded(table, num_shards)
    scores, ids = searches.top_k(queries, on_mesh, k, search)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(keys, expected, axis=1))
    ranks = exact_ranks(queries, on_mesh, expected[:, k - 1].astype("int32"), search)
    np.testing.assert_array_equal(ranks, [k - 1] * 70)
    excluded = rng.random(num_rows) < 0.5
    keys[:, excluded] = -np.inf
    _, ids = searches.top_k(queries, on_mesh, k, search, excluded=padded(excluded[:, None], num_shards, True)[:, 0])
    expected = np.stack([[row for row in np.argsort(-line, kind="stable") if not excluded[row]][:k] for line in keys])
    np.testing.assert_array_equal(ids, expected)


def test_ranks_agree_with_top_k_for_rounded_scores(rng):
    queries, table = rng.normal(size=(70, 16)).astype("float32"), rng.normal(size=(2_003, 16)).astype("float32")
    # Equal rows have equal scores at any position.
    table[1_500:1_800] = table[:300]
    for num_shards in (1, 3):
        search = Search(2_003, layout=layout_of_shards(num_shards, True))
        on_mesh = padded(table, num_shards)
        _, ids = searches.top_k(queries, on_mesh, 300, search)
        for place in (0, 1, 50, 299):
            np.testing.assert_array_equal(exact_ranks(queries, on_mesh, ids[:, place], search), [place] * 70)
        # Many targets are counted together.
        np.testing.assert_array_equal(exact_ranks(queries, on_mesh, ids, search), [np.arange(300)] * 70)


@pytest.mark.parametrize(("num_queries", "num_rows"), [(1, 5), (70, 37), (70, 1_683), (2, 4_099)])
def test_equal_rows_have_equal_scores(rng, num_queries, num_rows):
    """XLA's matrix product with one query would round the last rows differently."""
    for dimension in (7, 32, 100):
        table = np.tile(rng.normal(size=(1, dimension)), (num_rows, 1)).astype("float32")
        queries, search = rng.normal(size=(num_queries, dimension)).astype("float32"), Search(num_rows)
        scores, ids = searches.top_k(queries, table, 5, search)
        np.testing.assert_array_equal(ids, np.tile(np.arange(5), (num_queries, 1)))
        np.testing.assert_array_equal(scores, np.asarray(scores)[:, :1] * np.ones(5, "float32"))
        last = np.full(num_queries, num_rows - 1, "int32")
        np.testing.assert_array_equal(exact_ranks(queries, table, last, search), last)


@pytest.fixture(params=[True, False], ids=["vectorized loop", "kernel"])
def small_thresholds(monkeypatch, request):
    """Scores a single query as in large tables, on older and newer versions of XLA, at sizes that are fast to test."""
    monkeypatch.setattr(score_blocks, "VECTORIZES_LOOP", request.param)
    monkeypatch.setattr(score_blocks, "MIN_LOOP_ROWS", 100)
    monkeypatch.setattr(score_blocks, "MAX_CHEAP_BUFFER", 100 * 64)
    monkeypatch.setattr(searches, "MIN_TWO_LEVEL_SIZE", 100)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("num_rows", "num_shards", "similarity", "dtype"),
    [
        (101, 1, "dot", "float32"),
        (1_061, 1, "dot", "float32"),
        (1_061, 3, "dot", "bfloat16"),
        (1_061, 3, "cosine", "float32"),
        (1_061, 1, "cosine", "bfloat16"),
        (1_061, 3, "biased_cosine", "float32"),
        (1_061, 1, "biased_cosine", "bfloat16"),
    ],
)
def test_a_single_query_finds_what_many_find_in_a_large_table(
    small_thresholds, rng, num_rows, num_shards, similarity, dtype
):
    """Covers ties in all groups and in the last rows, and scores of NaN, inf, -inf and -0.0."""
    few = rng.normal(size=(40, 64)).astype("float32")
    queries = rng.normal(size=(3, 64)).astype("float32")
    few[:3, 7] = np.inf, -np.inf, np.nan
    few[3, :2] = np.inf, -np.inf
    if similarity == "dot":
        few[4], few[5] = 0.0, -0.0
    if similarity == "biased_cosine":
        few[6, -1], few[7, -1], few[8, -1] = np.inf, 1e20, -1e20
    table = np.asarray(jax.numpy.asarray(few, dtype)[rng.integers(0, 40, num_rows)])
    search = Search(num_rows, similarity, layout=layout_of_shards(num_shards, False))
    on_mesh, exclude_ids = padded(table, num_shards), rng.integers(0, num_rows, (3, 4)).astype("int32")
    with np.errstate(invalid="ignore"):
        expected_scores, expected_ids = reference.top_k(
            queries, table.astype("float32"), num_rows, similarity=similarity, exclude_ids_by_query=exclude_ids
        )
    for k in (10, num_rows):
        many = searches.top_k(queries, on_mesh, k, search, exclude_ids=exclude_ids)
        for i in range(3):
            one = slice(i, i + 1)
            scores, ids = searches.top_k(queries[one], on_mesh, k, search, exclude_ids=exclude_ids[one])
            np.testing.assert_array_equal(ids, expected_ids[one, :k])
            np.testing.assert_array_equal(ids, many[1][one])
            np.testing.assert_allclose(scores, expected_scores[one, :k], rtol=2e-5, atol=2e-6)
    ranks = exact_ranks(queries[:1], on_mesh, expected_ids[:1, [0, 9, 60]], search, exclude_ids[:1])
    np.testing.assert_array_equal(ranks, [[0, 9, 60]])


@pytest.mark.slow
def test_equal_rows_have_equal_scores_with_the_optimizations_of_xla():
    """The other tests run without most optimizations, which decide in which order a sum is rounded."""
    script = """
        import numpy as np
        from keras_rs_contrib.index.ranks import ranks
        from keras_rs_contrib.index.score_blocks import Search
        from keras_rs_contrib.index.top_k import top_k

        rng = np.random.default_rng(0)
        # On both sides of the numbers of rows and dimensions from which a single query is scored differently.
        for num_rows, dimension, similarity, dtype in (
            (20, 64, "dot", "float32"),
            (65_543, 63, "dot", "float32"),
            (65_543, 100, "dot", "float32"),
            (140_003, 64, "cosine", "float32"),
            (140_003, 64, "cosine", "bfloat16"),
            (140_003, 64, "biased_cosine", "float32"),
        ):
            search = Search(num_rows, similarity)
            table = rng.normal(size=(1, dimension)).astype(jax.numpy.dtype(dtype)).repeat(num_rows, axis=0)
            query = rng.normal(size=(1, dimension)).astype("float32")
            scores, ids = top_k(query, table, 5, search)
            assert ids[0].tolist() == [0, 1, 2, 3, 4], (search, dtype, ids)
            assert len(set(scores[0].tolist())) == 1, (search, dtype, scores)
            targets = np.array([[0, num_rows // 2, num_rows - 3, num_rows - 1]], "int32")
            found = ranks(query, table, targets, search)
            assert found.tolist() == targets.tolist(), (search, dtype, found)
    """
    result = subprocess.run(
        [sys.executable, "-c", "import jax\n" + textwrap.dedent(script)],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_nan_query_does_not_affect_other_queries(rng, num_shards):
    queries, table = small_integers(rng, 5, 3), small_integers(rng, 2_000, 3)
    queries[2, 1] = np.nan
    search = Search(2_000, layout=layout_of_shards(num_shards, True))
    on_mesh = padded(table, num_shards)
    scores, ids = searches.top_k(queries, on_mesh, 5, search)
    expected_scores, expected_ids = reference.top_k(queries, table, 5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert np.isnan(np.asarray(scores)[2]).all()
    ranks = exact_ranks(queries, on_mesh, np.maximum(expected_ids[:, 3], 0), search)
    np.testing.assert_array_equal(ranks, [3, 3, 2**31 - 1, 3, 3])


@pytest.mark.parametrize("num_excluded", [3, searches.MAX_COMPARED_IDS + 1])
def test_many_ids_may_be_excluded(rng, num_excluded):
    queries, table = small_integers(rng, 4, 3), small_integers(rng, 600, 3)
    exclude_ids = rng.integers(-1, 600, (4, num_excluded)).astype("int32")
    _, ids = searches.top_k(queries, table, 10, Search(600), exclude_ids=exclude_ids)
    np.testing.assert_array_equal(ids, reference.top_k(queries, table, 10, exclude_ids_by_query=exclude_ids)[1])


def test_scores_of_bfloat16_tables_are_summed_in_float32(rng):
    """Sums in bfloat16 would round these near-ties to equal scores."""
    table = jax.numpy.asarray(1 + rng.integers(-3, 4, (500, 64)) / 128, "bfloat16")
    queries = rng.normal(size=(6, 64)).astype("float32")
    exact = np.asarray(table).astype("float64")
    keys = queries.astype("float64") @ exact.T
    assert np.diff(np.sort(keys, axis=1)).min() < 1e-3
    scores, ids = searches.top_k(queries, table, 20, Search(500))
    np.testing.assert_allclose(scores, -np.sort(-keys, axis=1)[:, :20], rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(keys, np.asarray(ids), axis=1), scores, rtol=0, atol=2e-5)
    for similarity in SIMILARITIES:
        whole = searches.top_k(queries, table, 20, Search(500, similarity))
        in_parts = searches.top_k(queries, table, 20, Search(500, similarity, block_size=64 * 70))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, in_parts)


def test_recall_target_has_an_effect_on_tpus_only(rng, monkeypatch):
    queries, table = rng.normal(size=(4, 8)).astype("float32"), rng.normal(size=(4_000, 8)).astype("float32")
    search = Search(4_000, recall_target=0.9)
    assert "approx_top_k" not in str(jax.make_jaxpr(lambda q, t: searches.top_k(q, t, 10, search))(queries, table))
    _, exact = searches.top_k(queries, table, 10, search)
    np.testing.assert_array_equal(exact, reference.top_k(queries, table, 10)[1])
    monkeypatch.setattr(searches, "platform_of", lambda search: "tpu")
    jax.clear_caches()
    assert "approx_top_k" in str(jax.make_jaxpr(lambda q, t: searches.top_k(q, t, 10, search))(queries, table))
    _, found = searches.top_k(queries, table, 10, search)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(np.asarray(found), np.asarray(exact), strict=True)]) > 0.8
    jax.clear_caches()


# Memory and communication.


def memory(function, *arguments, **keywords):
    return function.lower(*arguments, **keywords).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_bounded_by_the_block():
    queries, table = jax.ShapeDtypeStruct((1024, 32), "float32"), jax.ShapeDtypeStruct((100_003, 32), "float32")
    targets, exclude = jax.ShapeDtypeStruct((1024,), "int32"), jax.ShapeDtypeStruct((1024, 20), "int32")
    small, large = 2**20, 2**22
    search = Search(100_003, block_size=small)
    assert memory(searches.top_k, queries, table, 10, search, exclude_ids=exclude) < 4 * 1.3 * small
    assert memory(exact_ranks, queries, table, targets, search, exclude) < 4 * 2.3 * small
    assert memory(searches.top_k, queries, table, 10, Search(100_003, block_size=large)) < 4 * 1.3 * large
    assert memory(searches.top_k, queries, table, 10, Search(100_003, "cosine", block_size=large)) < 4 * 2.5 * large


@pytest.mark.parametrize(
    ("similarity", "dtype"),
    [("dot", "bfloat16"), ("cosine", "bfloat16"), ("cosine", "float32"), ("biased_cosine", "float32")],
)
@pytest.mark.parametrize("block_size", [score_blocks.BLOCK_SIZE, 2**22])
def test_a_single_query_needs_no_float32_or_normalized_copy_of_a_large_table(similarity, dtype, block_size):
    num_rows, dimension = 300_007, 64
    query, table = jax.ShapeDtypeStruct((1, dimension), "float32"), jax.ShapeDtypeStruct((num_rows, dimension), dtype)
    search = Search(num_rows, similarity, block_size)
    assert memory(searches.top_k, query, table, 10, search) < 4 * 6 * num_rows
    assert memory(exact_ranks, query, table, jax.ShapeDtypeStruct((1,), "int32"), search) < 4 * 6 * num_rows


def collectives(function, name, *arguments):
    """Returns the shapes that devices exchange, as `(operation, [dimensions])`."""
    layout = layout_of(name)
    queries, table = placed(layout, np.ones((32, 16), "float32"), np.ones((4000, 16), "float32"))
    text = function.lower(queries, table, *arguments, Search(4000, layout=layout)).compile().as_text()
    text = re.sub(r"/\*.*?\*/", "", text)
    operations = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = re.findall(rf"= (\(?[^=]*?\)?) ({operations})(?:-start)?\(", text)
    return [
        (operation, [int(n) for n in dims.split(",") if n])
        for shapes, operation in found
        for dims in re.findall(r"\w\d+\[([\d,]*)\]", shapes)
    ]


def collectives_of_ranks(name):
    return collectives(exact_ranks, name, np.zeros(32, "int32"))


@pytest.mark.parametrize("name", ["replicated", "replicated on two axes"])
def test_a_replicated_table_needs_no_communication(name):
    assert collectives(searches.top_k, name, 5) == []
    assert collectives_of_ranks(name) == []


@pytest.mark.parametrize("name", ["rows over the other axis", "5 shards"])
def test_split_rows_exchange_only_k_pairs_for_each_query_and_shard(name):
    shape, _, _ = LAYOUTS[name]
    queries_a_device, num_shards = 32 // shape[0], shape[1]
    found = collectives(searches.top_k, name, 5)
    assert found
    for operation, dims in found:
        assert operation == "all-gather"
        assert np.prod(dims) <= queries_a_device * num_shards * 5


def test_one_axis_for_queries_and_rows_exchanges_only_queries_and_pairs():
    found = collectives(searches.top_k, "rows over the batch axis", 5)
    assert {operation for operation, _ in found} == {"all-gather", "all-to-all"}
    assert [dims for operation, dims in found if operation == "all-gather"] == [[32, 16]]
    for operation, dims in found:
        if operation == "all-to-all":
            assert np.prod(dims) <= 32 * 5


@pytest.mark.parametrize("name", ["rows over the other axis", "rows over the batch axis"])
def test_ranks_exchange_only_a_score_and_a_count_for_each_query(name):
    found = collectives_of_ranks(name)
    gathered = [np.prod(dims) for operation, dims in found if operation == "all-gather"]
    assert sorted(gathered) == ([32, 32 * 16] if name == "rows over the batch axis" else [])
    others = [dims for operation, dims in found if operation != "all-gather"]
    assert len(others) == 2
    assert all(np.prod(dims) <= 32 for dims in others)
