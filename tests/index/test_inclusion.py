"""Searches that are limited to some candidates give the results of the whole corpus, without the others."""

import os
import subprocess
import sys
import textwrap

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import DISTRIBUTIONS
from models import brute_force

from keras_rs_contrib import ShardedEmbedding, shard_candidates
from keras_rs_contrib.index import inclusion
from keras_rs_contrib.index.listed_candidates import ranks_of_listed, top_k_of_listed
from keras_rs_contrib.index.score_blocks import Search

NUM_CANDIDATES, NUM_QUERIES, DIMENSION = 43, 24, 4
# Distribution, axis that splits the rows, whether the index has ids, similarity, tower, and how lists are searched.
CASES = [
    ("1 device", None, False, "dot", "table", "masked"),
    ("1 device", None, True, "cosine", "features", "gathered"),
    ("DataParallel(2)", "batch", False, "biased_cosine", "features", "gathered"),
    ("DataParallel(3)", "batch", True, "dot", "table", "masked"),
    ("DataParallel(8)", None, False, "dot", "features", "masked"),
    ("ModelParallel(2x4)", None, True, "dot", "table", "masked"),
    ("ModelParallel(2x4)", "batch", False, "dot", "features", "gathered"),
]
LAYOUTS = [("1 device", None), ("DataParallel(3)", "batch")]


def search_lists(monkeypatch, how):
    """Sets the share of the rows up to which lists are gathered: none, or all."""
    for name in ("GATHERED_SHARE", "GATHERED_SHARE_BY_QUERY"):
        monkeypatch.setattr(inclusion, name, {"masked": 0.0, "gathered": 99.0}[how])


@pytest.fixture(params=["masked", "gathered"])
def how(request, monkeypatch):
    search_lists(monkeypatch, request.param)
    return request.param


def make_index(rng, with_ids=False, similarity="dot", tower="table", mesh_axis=None, num_excluded=2, k=7, **arguments):
    """Returns an index, its ids and its table: for "dot", whole numbers, whose scores are exact and often equal."""
    table = rng.integers(-2, 3, (NUM_CANDIDATES, DIMENSION)).astype("float32")
    if similarity != "dot":
        table = rng.normal(size=table.shape).astype("float32")
    ids = rng.permutation(NUM_CANDIDATES) * 3 - 20 if with_ids else np.arange(NUM_CANDIDATES)
    arguments.update(
        candidate_ids=ids if with_ids else None, similarity=similarity, mesh_axis=mesh_axis,
        exclude_ids=rng.choice(ids, num_excluded, replace=False),
    )  # fmt: skip
    if tower == "features":
        dense = keras.layers.Dense(DIMENSION, use_bias=False, kernel_initializer="identity")
        features = keras.Sequential([keras.Input((DIMENSION,)), dense])
        arguments["candidates"] = table
        index = shard_candidates(brute_force(k, return_scores=True), features, **arguments)
    else:
        movies = ShardedEmbedding(NUM_CANDIDATES, DIMENSION, name="movie_tower")
        index = shard_candidates(brute_force(k, return_scores=True), movies, **arguments)
        index.build((None, DIMENSION))
        padding = movies.embeddings.shape[0] - NUM_CANDIDATES
        # The padding rows would often win if the search included them.
        movies.embeddings.assign(np.pad(table, ((0, padding), (0, 0)), constant_values=9.0))
    return index, ids, table


def make_lists(rng, ids, num_queries=NUM_QUERIES):
    """Lists for all queries and for each: short, long, empty, with duplicates, unknown ids and -1."""
    other = [-1, 10**6, -(10**6)]
    rows = [[*rng.choice(ids, int(rng.integers(0, 12))), *other[: rng.integers(0, 4)]] for _ in range(num_queries)]
    width = max(map(len, rows))
    most = np.stack([rng.permutation(ids)[:-3] for _ in range(num_queries)])
    return {
        "few": np.array([*rng.choice(ids, 4), *other]),
        "one": ids[5:6],
        "none": np.zeros(0, int),
        "unknown": np.array(other),
        "half": rng.permutation(ids)[:20],
        "most": rng.permutation(ids)[:-3],
        "all": ids,
        "twice": np.tile(rng.choice(ids, 6), 20),
        "few by query": np.array([row + [-1] * (width - len(row)) for row in rows]),
        "none by query": np.zeros((num_queries, 0), int),
        "most by query": most,
    }


def left_out(ids, included, exclude_ids, num_queries):
    """The excluded ids of each query that have the effect of `included`."""
    rows = np.broadcast_to(included, (num_queries, np.shape(included)[-1]))
    exclude = np.full((num_queries, 1), -1) if exclude_ids is None else exclude_ids
    return [[*np.setdiff1d(ids, row), *np.asarray(own)] for row, own in zip(rows, exclude, strict=True)]


def expected_top_k(index, queries, table, ids, included, exclude_ids=None, k=7):
    return reference.top_k(
        queries, table, k, similarity=index.similarity, ids=ids.tolist(), exclude_ids=index.exclude_ids,
        exclude_ids_by_query=left_out(ids, included, exclude_ids, len(queries)),
    )  # fmt: skip


def small_queries(rng, num_queries=NUM_QUERIES):
    return rng.integers(-2, 3, (num_queries, DIMENSION)).astype("float32") + np.float32(0.5)


def assert_found(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert (found[0].dtype, found[1].dtype) == ("float32", "int32")


@pytest.mark.parametrize(("name", "mesh_axis", "with_ids", "similarity", "tower", "how"), CASES)
def test_only_included_candidates_are_returned_and_ranked(
    rng, monkeypatch, name, mesh_axis, with_ids, similarity, tower, how
):
    search_lists(monkeypatch, how)
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    index, ids, table = make_index(rng, with_ids, similarity, tower, mesh_axis)
    queries, lists = small_queries(rng), make_lists(rng, ids)
    queries[3] = np.nan
    exclude_ids = np.concatenate([rng.choice(ids, (NUM_QUERIES, 3)), np.full((NUM_QUERIES, 1), -1)], axis=1)
    targets = rng.choice(ids, (NUM_QUERIES, 2))
    targets[rng.random(targets.shape) < 0.1] = -1
    kinds = ("few", "few by query") if how == "gathered" else ("most", "most by query")
    for kind, exclude in zip(kinds, (exclude_ids, exclude_ids if with_ids else None), strict=True):
        included = lists[kind]
        found = index(queries, exclude_ids=exclude, include_ids=included)
        assert_found(found, expected_top_k(index, queries, table, ids, included, exclude))
        ranks = index.ranks(queries, targets, exclude_ids=exclude, include_ids=included)
        for column, wanted in enumerate(targets.T):
            expected = reference.ranks(
                queries, table, wanted.tolist(), similarity=similarity, ids=ids.tolist(),
                exclude_ids=index.exclude_ids, exclude_ids_by_query=left_out(ids, included, exclude, NUM_QUERIES),
            )  # fmt: skip
            np.testing.assert_array_equal(ranks[:, column], np.where(wanted == -1, -1, expected), kind)


@pytest.mark.parametrize(("name", "mesh_axis"), LAYOUTS)
def test_a_mask_has_a_bool_for_each_row(rng, how, name, mesh_axis):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    # More than are dropped, on one device.
    num_excluded = 20 if mesh_axis is None else 0
    index, ids, table = make_index(rng, with_ids=True, mesh_axis=mesh_axis, num_excluded=num_excluded)
    queries, targets = small_queries(rng), rng.choice(ids, NUM_QUERIES)
    compiled = jax.jit(lambda queries, mask: index.find(queries, 7, include_mask=mask))
    for share in (0.1, 0.95) if mesh_axis is None else (0.1,):
        for shape in ((NUM_CANDIDATES,), (NUM_QUERIES, NUM_CANDIDATES)):
            mask = rng.random(shape) < share
            rows = [ids[row].tolist() for row in np.broadcast_to(mask, (NUM_QUERIES, NUM_CANDIDATES))]
            width = max(map(len, rows)) + 1
            included = np.array([row + [-1] * (width - len(row)) for row in rows])
            expected = expected_top_k(index, queries, table, ids, included)
            assert_found(index.find(queries, 7, include_mask=mask), expected)
            ranks = index.ranks(queries, targets, include_mask=mask)
            np.testing.assert_array_equal(ranks, index.ranks(queries, targets, include_ids=included))
            assert_found(compiled(queries, mask), expected)


@pytest.mark.parametrize(
    ("num_queries", "name", "mesh_axis"),
    [
        (0, "1 device", None),
        (5, "1 device", None),
        (1, "DataParallel(8)", "batch"),
        (5, "ModelParallel(2x4)", None),
    ],
)
def test_any_number_of_queries_may_be_limited(rng, how, num_queries, name, mesh_axis):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    index, ids, table = make_index(rng, with_ids=True, mesh_axis=mesh_axis)
    queries = small_queries(rng, num_queries)
    lists = make_lists(rng, ids, max(1, num_queries))
    for kind, included in lists.items():
        if included.ndim == 2:
            included = included[:num_queries]
        elif name != "1 device" and kind not in ("few", "none"):
            continue
        found = index(queries, include_ids=included)
        assert found[0].shape == found[1].shape == (num_queries, 7)
        if num_queries:
            assert_found(found, expected_top_k(index, queries, table, ids, included))


@pytest.mark.parametrize(("name", "mesh_axis"), LAYOUTS)
def test_included_ids_may_be_inputs_of_a_compiled_model(rng, how, name, mesh_axis):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    index, ids, table = make_index(rng, with_ids=mesh_axis is None, mesh_axis=mesh_axis)
    inputs = keras.Input((DIMENSION,)), keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    model = keras.Model(inputs, index(inputs[0], exclude_ids=inputs[1], include_ids=inputs[2]))
    assert [output.shape for output in model.outputs] == [(None, 7)] * 2
    queries, lists = small_queries(rng), make_lists(rng, ids)
    exclude_ids = rng.choice(ids, (NUM_QUERIES, 2)).astype("int32")
    for kind in ("few by query", "none by query") if how == "gathered" else ("most by query",):
        included = lists[kind].astype("int32")
        expected = expected_top_k(index, queries, table, ids, included, exclude_ids)
        found = model.predict([queries, exclude_ids, included], batch_size=NUM_QUERIES, verbose=0)
        assert_found(found, expected)
    compiled = jax.jit(lambda queries, included: index(queries, include_ids=included))
    ranks = jax.jit(lambda queries, targets, included: index.ranks(queries, targets, include_ids=included))
    targets = rng.choice(ids, NUM_QUERIES).astype("int32")
    for kind in ("few", "none") if how == "gathered" else ("most", "most by query"):
        included = lists[kind].astype("int32")
        expected = expected_top_k(index, queries, table, ids, included)
        assert_found(compiled(queries, included), expected)
        np.testing.assert_array_equal(
            ranks(queries, targets, included), index.ranks(queries, targets, include_ids=included)
        )


def test_a_loaded_index_finds_its_ids(rng, tmp_path):
    index, ids, table = make_index(rng, with_ids=True)
    inputs = keras.Input((DIMENSION,))
    keras.Model(inputs, index(inputs)).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").layers[-1]
    queries, included = small_queries(rng), ids[[4, 1, 30]]
    expected = expected_top_k(index, queries, table, ids, included)
    assert_found(loaded(queries, include_ids=included), expected)
    other = make_index(np.random.default_rng(1), with_ids=True)[0]
    other.set_weights(index.get_weights())
    other.exclude_ids = index.exclude_ids
    assert_found(other(queries, include_ids=included), expected)


def test_included_ids_follow_the_ids_of_a_corpus_that_changes(rng):
    index, _, table = make_index(rng, with_ids=True, tower="features", num_excluded=0)
    queries = small_queries(rng)
    for num_candidates in (20, 43, 9):
        names = rng.permutation(num_candidates) + 500
        index.refresh(table[:num_candidates], names)
        included = names[[2, 8, 5]]
        expected = expected_top_k(index, queries, table[:num_candidates], names, included)
        assert_found(index(queries, include_ids=included), expected)
        np.testing.assert_array_equal(index.ranks(queries, expected[1][:, 1], include_ids=included), [1] * NUM_QUERIES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_of_included_candidates_are_float32(rng, how, dtype):
    tower = keras.layers.Embedding(40, DIMENSION, dtype=dtype, embeddings_initializer="normal")
    index = shard_candidates(brute_force(5, return_scores=True), tower)
    queries = jax.numpy.asarray(rng.normal(size=(6, DIMENSION)), dtype)
    for included in ([3, 9, 11, 30, 2, 7], rng.integers(0, 40, (6, 9))):
        found = index(queries, include_ids=included)
        table = np.asarray(tower.embeddings.value).astype("float64")
        expected = reference.top_k(
            np.asarray(queries).astype("float64"), table, 5,
            exclude_ids_by_query=left_out(np.arange(40), included, None, 6),
        )  # fmt: skip
        assert_found(found, expected)


@pytest.mark.parametrize("block_size", [1, 50])
def test_blocks_do_not_change_the_result(rng, how, block_size):
    index, ids, table = make_index(rng, block_size=block_size, recall_target=0.9)
    queries = small_queries(rng)
    for included in make_lists(rng, ids).values():
        assert_found(index(queries, include_ids=included), expected_top_k(index, queries, table, ids, included))


@pytest.mark.parametrize(("num_queries", "num_included"), [(70, 37), (2, 1_683)])
def test_equal_rows_have_equal_scores_in_any_list(rng, how, num_queries, num_included):
    for dimension in (7, 32, 100):
        table = np.tile(rng.normal(size=(1, dimension)), (2_000, 1)).astype("float32")
        index = shard_candidates(
            brute_force(5, return_scores=True), keras.layers.Embedding(2_000, dimension, weights=table)
        )
        queries = rng.normal(size=(num_queries, dimension)).astype("float32")
        rows = np.stack([rng.choice(2_000, num_included, replace=False) for _ in range(num_queries)])
        for included in (rows[0], rows):
            scores, ids = index(queries, include_ids=included)
            expected = np.sort(np.broadcast_to(included, rows.shape), axis=1)
            np.testing.assert_array_equal(ids, expected[:, :5])
            np.testing.assert_array_equal(scores, np.asarray(scores)[:, :1] * np.ones(5, "float32"))
            ranks = index.ranks(queries, expected[:, -1], include_ids=included)
            np.testing.assert_array_equal(ranks, [num_included - 1] * num_queries)


def test_random_lists_match_the_whole_corpus_without_the_others(rng):
    """The ways of searching differ in the order of their sums: the scores are compared up to rounding."""
    tower = keras.layers.Embedding(5_000, 16, embeddings_initializer="normal")
    index = shard_candidates(brute_force(20, return_scores=True), tower)
    queries = rng.normal(size=(70, 16)).astype("float32")
    index(queries)
    scores = queries.astype("float64") @ tower.embeddings.numpy().astype("float64").T
    for num_included in (3, 30, 600, 2_500, 4_990, 5_000):
        for shape in ((), (70,)):
            everything = np.broadcast_to(np.arange(5_000), (*shape, 5_000))
            included = rng.permuted(everything, axis=-1)[..., :num_included]
            masked = np.full_like(scores, -np.inf)
            rows = np.broadcast_to(included, (70, num_included))
            np.put_along_axis(masked, rows, np.take_along_axis(scores, rows, axis=1), axis=1)
            found, ids = index(queries, include_ids=included)
            expected = -np.sort(-masked, axis=1)[:, :20]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            known = np.asarray(ids) >= 0
            np.testing.assert_array_equal(known, expected > -np.inf)
            np.testing.assert_allclose(
                np.take_along_axis(masked, np.where(known, ids, 0), axis=1)[known],
                expected[known],
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.slow
def test_another_backend_limits_its_search_too():
    script = """
        import sys
        import keras, keras_rs, numpy as np, tensorflow as tf
        import reference
        from keras_rs_contrib import shard_candidates
        from keras_rs_contrib.index import inclusion
        rng = np.random.default_rng(0)
        table = rng.integers(-2, 3, (43, 4)).astype("float32")
        queries = rng.integers(-2, 3, (6, 4)).astype("float32") + np.float32(0.5)
        ids = rng.permutation(43) * 3 - 20
        for num_own, gathered in ((2, 99.0), (2, 0.0), (20, 0.0)):
            inclusion.GATHERED_SHARE = inclusion.GATHERED_SHARE_BY_QUERY = gathered
            own = rng.choice(ids, num_own, replace=False)
            tower = keras.layers.Embedding(43, 4, weights=table)
            index = shard_candidates(
                keras_rs.layers.BruteForceRetrieval(k=7), tower, candidate_ids=ids, exclude_ids=own)
            exclude_ids = rng.choice(ids, (6, 3))
            rows = np.stack([rng.permutation(ids)[:12] for _ in range(6)])
            rows[:, 3:5] = -1
            rows[:, 5] = rows[:, 6]
            everything = ids[None].repeat(6, 0)
            for included in (ids[[3, 9, 9, 20]], np.array([10**6, -1]), ids[:0], ids[:40], rows, everything):
                by_query = np.broadcast_to(included, (6, included.shape[-1]))
                left_out = [[*np.setdiff1d(ids, row), *own] for row, own in zip(by_query, exclude_ids)]
                expected = reference.top_k(
                    queries, table, 7, ids=ids.tolist(), exclude_ids=own, exclude_ids_by_query=left_out)
                mask = np.isin(ids, included) if included.ndim == 1 else np.stack([np.isin(ids, r) for r in rows])
                if included is everything:
                    mask = np.ones((6, 43), bool)
                compiled, int32 = tf.function(index), included.astype("int32")
                for found in (
                    index(queries, exclude_ids=exclude_ids, include_ids=included),
                    index.find(queries, 7, exclude_ids=exclude_ids, include_mask=mask),
                    compiled(queries, exclude_ids=exclude_ids.astype("int32"), include_ids=tf.constant(int32)),
                ):
                    np.testing.assert_array_equal(found[1], expected[1])
                    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        print("done")
    """
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "done", result.stderr


# What is computed.


def flops(function, *arguments):
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def test_the_cost_follows_the_shorter_side(rng):
    tower = keras.layers.Embedding(20_000, 16)
    index = shard_candidates(brute_force(5), tower)
    queries = rng.normal(size=(64, 16)).astype("float32")
    index(queries)

    def cost(included):
        return flops(lambda q, i: index(q, include_ids=i), queries, included.astype("int32"))

    whole = flops(index, queries)
    products = 2 * 64 * 16
    assert whole > products * 20_000
    for included in (rng.integers(0, 20_000, 100), rng.integers(0, 20_000, (64, 100))):
        assert products * 50 < cost(included) < whole / 20
    rows = inclusion.Rows(20_000, 20_000, 1, None, None, 16)

    def form(include_ids=None, include_mask=None):
        found = inclusion.inclusion(include_ids, include_mask, 64, rows)
        return [name for name, value in vars(found).items() if value is not None]

    assert form() == []
    for shape in ((), (64,)):
        everything = np.broadcast_to(np.arange(20_000), (*shape, 20_000))
        for part, expected in [
            (slice(0, 100), "listed_ids"),
            (slice(10, None), "dropped_ids"),
            (slice(0, 10_000), "included" if shape else "excluded"),
        ]:
            mask = np.zeros(everything.shape, bool)
            mask[..., part] = True
            assert form(include_ids=everything[..., part]) == form(include_mask=mask) == [expected]


def test_the_memory_of_lists_is_bounded_by_the_block():
    queries, table = jax.ShapeDtypeStruct((1024, 32), "float32"), jax.ShapeDtypeStruct((100_003, 32), "float32")
    targets, lists = jax.ShapeDtypeStruct((1024, 1), "int32"), jax.ShapeDtypeStruct((1024, 500), "int32")
    search = Search(100_003, block_size=2**20)
    for lowered in (
        top_k_of_listed.lower(queries, table, lists, 10, search),
        ranks_of_listed.lower(queries, table, targets, lists, search),
    ):
        # All candidates of all lists would take 64 MiB.
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * 4 * 2**20


def test_lists_of_similar_lengths_share_a_compiled_program(rng):
    index, ids, _ = make_index(rng)
    queries, lengths = small_queries(rng), []
    for length in (5, 6, 7, 8):
        found = inclusion.inclusion(ids[:length], None, NUM_QUERIES, inclusion.Rows(999, 999, 1, None, None, 16))
        lengths.append(found.listed_ids.shape)
        assert_found(index(queries, include_ids=ids[:length]), index(queries, include_ids=found.listed_ids))
    assert lengths == [(8,)] * 4


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"include_ids": [[1], [2]]}, ValueError, r"have a row for each query. Received: shape \(2, 1\) for 3 queries"),
        ({"include_ids": 7}, ValueError, r"`include_ids` must be flat.*shape \(\)"),
        ({"include_ids": [[[1]], [[1]], [[1]]]}, ValueError, r"shape \(3, 1, 1\)"),
        ({"include_ids": [1.0]}, TypeError, "`include_ids` must be integers. Received: dtype float64"),
        ({"include_ids": [2**32 + 5]}, ValueError, r"`include_ids` must be in \[-2147483648, 2147483647\]"),
        ({"include_ids": [[1], [2, 3], []]}, TypeError, "Pass rows of equal length"),
        ({"include_ids": np.ones(43, bool)}, TypeError, "`include_ids` must be ids.*an array of bools.*`include_mask`"),
        ({"include_ids": [1], "include_mask": [True] * 43}, ValueError, "by id or by a mask.*Drop one of them"),
        ({"include_mask": [1] * 43}, TypeError, "must be of bools.*dtype int64. Pass ids as `include_ids`"),
        ({"include_mask": [True] * 42}, ValueError, r"one bool for each row.*shape \(42,\) for 43 candidates"),
        ({"include_mask": np.ones((2, 43), bool)}, ValueError, r"shape \(2, 43\) for 3 queries"),
    ],
)
def test_invalid_lists_raise(rng, arguments, error, words):
    index, _, _ = make_index(rng)
    queries = small_queries(rng, 3)
    with pytest.raises(error, match=words):
        index.find(queries, 5, **arguments)
    with pytest.raises(error, match=words):
        index.ranks(queries, [1, 2, 3], **arguments)
    if "include_mask" not in arguments:
        with pytest.raises(error, match=words):
            index(queries, **arguments)
