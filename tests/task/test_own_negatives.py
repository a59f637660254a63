"""`negative_embeddings`: negatives that a query has for itself."""

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel
from softmax_cases import BATCH, DIMENSION, NUM_CANDIDATES, SOFTMAX_CASES, call_arguments, embeddings

from keras_rs_contrib import DistributedTwoTowerTask
from keras_rs_contrib.task import in_batch_softmax
from keras_rs_contrib.task import logits as batch_logits

CATEGORICAL = keras.losses.CategoricalCrossentropy(from_logits=True)
FORMS = ["full logits", "streamed", "custom loss", "local", "local and streamed"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if "streamed" in request.param:
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
        monkeypatch.setattr(in_batch_softmax, "MIN_BLOCK_QUERIES", 2)
        monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 1)
        monkeypatch.delattr(in_batch_softmax.InBatchSoftmax, "logits")
    if "local" in request.param:
        keras.distribution.set_distribution(data_parallel(2))
    return request.param


def make_task(form, **constructor):
    loss = CATEGORICAL if form == "custom loss" else None
    return DistributedTwoTowerTask(loss, negatives="local" if "local" in form else "global", **constructor)


def gradients_by_name(task, arrays, arguments):
    """Returns the loss and its gradients for some of the arguments of a call."""
    return jax.jit(jax.value_and_grad(lambda given: task(**given, **arguments)))(arrays)


def assert_matches_the_reference(task, queries, candidates, arguments, constructor, num_parts=1):
    names = ["negative_embeddings", "negative_sampling_probability"]
    given = {"query_embeddings": queries, "candidate_embeddings": candidates}
    given.update({name: arguments[name] for name in names if name in arguments})
    constant = {name: value for name, value in arguments.items() if name not in given}
    loss, gradients = gradients_by_name(task, given, constant)

    def expected(arrays):
        arrays = dict(arrays)
        q, c = arrays.pop("query_embeddings"), arrays.pop("candidate_embeddings")
        return reference.local_softmax_loss(q, c, num_parts, **constructor, **constant, **arrays)

    np.testing.assert_allclose(loss, expected(given), rtol=1e-5)
    for name, gradient in gradients.items():
        numeric = reference.gradient(lambda value, name=name: expected({**given, name: value}), given[name])
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("case", "heads"), [("own negatives with ids", 3), ("all", None)])
def test_loss_and_all_gradients_match_the_reference(rng, form, case, heads):
    constructor, names = SOFTMAX_CASES[case]
    queries, candidates = embeddings(rng, heads, 6, 9)
    arguments = call_arguments(rng, names, 6, 9)
    if "negative_sampling_probability" in arguments:
        # The loss jumps at 0, so finite differences there are not the gradient.
        arguments["negative_sampling_probability"] = rng.uniform(0.1, 0.9, (6, 4)).astype("float32")
    task = make_task(form, **constructor)
    num_parts = 2 if "local" in form else 1
    assert_matches_the_reference(task, queries, candidates, arguments, constructor, num_parts)


@pytest.mark.parametrize("num_hard_negatives", [2, 50])
def test_hard_negatives_are_chosen_among_all_negatives(rng, form, num_hard_negatives):
    queries, candidates = embeddings(rng, None, 6, 9)
    arguments = call_arguments(rng, ("negative_embeddings",), 6, 9)
    constructor = {"num_hard_negatives": num_hard_negatives}
    task = make_task(form, **constructor)
    assert_matches_the_reference(task, queries, candidates, arguments, constructor, 2 if "local" in form else 1)


@pytest.mark.parametrize("num_devices", [2, 3])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_devices_agree(rng, num_devices, is_streamed, monkeypatch):
    if is_streamed:
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
        monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 64)
    constructor, names = SOFTMAX_CASES["own negatives with ids"]
    queries, candidates = embeddings(rng, batch=24, num_candidates=48)
    arguments = {
        "query_embeddings": queries,
        "candidate_embeddings": candidates,
        **call_arguments(rng, (*names, "positive_ids", "candidate_mask"), 24, 48),
    }
    embedded = ("query_embeddings", "candidate_embeddings", "negative_embeddings")
    task = DistributedTwoTowerTask(**constructor)
    results = []
    for distribution in (None, data_parallel(num_devices)):
        keras.distribution.set_distribution(distribution)
        given = dict(arguments)
        if distribution is not None:
            for name, value in given.items():
                layout = distribution.get_data_layout(value.shape)
                given[name] = keras.distribution.distribute_tensor(keras.ops.convert_to_tensor(value), layout)
        arrays = {name: given.pop(name) for name in embedded}
        results.append(gradients_by_name(task, arrays, given))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_values_of_padding_do_not_reach_the_loss(rng, form):
    queries, candidates = embeddings(rng, None, 6, 9)
    names = ("candidate_ids", "candidate_mask", "negative_embeddings", "negative_ids", "negative_sampling_probability")
    arguments = call_arguments(rng, names, 6, 9)
    arguments["negative_ids"][2, 1:] = -1
    is_padding = (arguments["negative_ids"] == -1) | ~arguments["candidate_mask"][:6, None]
    assert is_padding.any(axis=1).sum() > 2
    task, results = make_task(form, remove_accidental_hits=True), []
    for value in (0.0, np.nan, np.inf):
        for name in ("negative_embeddings", "negative_sampling_probability"):
            arguments[name] = arguments[name].copy()
            arguments[name][is_padding] = value
        given = {"q": queries, "c": candidates, "n": arguments.pop("negative_embeddings")}

        def loss(given):
            return task(given["q"], given["c"], negative_embeddings=given["n"], **arguments)

        results.append(jax.jit(jax.value_and_grad(loss))(given))
        arguments["negative_embeddings"] = given["n"]
        np.testing.assert_array_equal(np.asarray(results[-1][1]["n"])[is_padding], 0)
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])
    assert np.isfinite(results[0][0])


def test_values_of_padded_queries_do_not_reach_the_loss_without_ids(rng, form):
    queries, candidates = embeddings(rng, None, 6, 9)
    arguments = call_arguments(rng, ("candidate_mask", "negative_embeddings"), 6, 9)
    task = make_task(form)
    expected = task(queries, candidates, **arguments)
    arguments["negative_embeddings"][~arguments["candidate_mask"][:6]] = np.nan
    np.testing.assert_array_equal(task(queries, candidates, **arguments), expected)


def test_custom_loss_sees_the_own_negatives_after_the_candidates(rng):
    seen = []

    class Recording(keras.losses.Loss):
        def call(self, labels, logits):
            seen.append((np.asarray(labels), np.asarray(logits)))
            return keras.ops.sum(logits, axis=1)

    queries, candidates = embeddings(rng)
    negatives = rng.normal(size=(BATCH, 2, DIMENSION)).astype("float32")
    DistributedTwoTowerTask(Recording())(queries, candidates, negative_embeddings=negatives)
    labels, logits = seen[0]
    np.testing.assert_array_equal(labels, np.eye(BATCH, NUM_CANDIDATES + 2))
    expected = [[query @ row for row in [*candidates, *own]] for query, own in zip(queries, negatives, strict=True)]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_negative_counts_once_for_each_time_that_it_is_given(rng):
    queries, candidates = embeddings(rng)
    negatives = np.repeat(rng.normal(size=(BATCH, 1, DIMENSION)), 3, axis=1).astype("float32")
    ids = np.tile([[8, 8, 8]], (BATCH, 1))
    rows = np.exp(np.einsum("id,jd->ij", queries, candidates))
    total = rows.sum(axis=1) + 3 * np.exp(np.einsum("id,id->i", queries, negatives[:, 0]))
    expected = np.mean(np.log(total) - np.log(np.diagonal(rows)))
    loss = DistributedTwoTowerTask()(queries, candidates, negative_embeddings=negatives, negative_ids=ids)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(("remove_accidental_hits", "with_ids"), [(True, True), (True, False), (False, True)])
def test_a_negative_equal_to_the_positive_is_an_accidental_hit_if_ids_tell(rng, remove_accidental_hits, with_ids):
    queries, candidates = embeddings(rng)
    arguments = {"candidate_ids": np.arange(NUM_CANDIDATES)}
    task = DistributedTwoTowerTask(remove_accidental_hits=remove_accidental_hits)
    without = float(task(queries, candidates, **arguments))
    if with_ids:
        arguments["negative_ids"] = np.arange(BATCH)[:, None]
    loss = float(task(queries, candidates, negative_embeddings=candidates[:BATCH, None], **arguments))
    if remove_accidental_hits and with_ids:
        np.testing.assert_allclose(loss, without, rtol=1e-6)
    else:
        assert loss > without + 0.01


def test_a_probability_of_zero_lets_a_negative_count_like_one_candidate_of_the_corpus():
    """With all scores 0, the mean of `1 / probability` over the candidates estimates their number, 8."""
    queries, candidates = np.zeros((1, 2), "float32"), np.zeros((16, 2), "float32")
    loss = DistributedTwoTowerTask()(
        queries,
        candidates,
        candidate_sampling_probability=np.full(16, 1 / 8),
        negative_embeddings=np.zeros((1, 3, 2)),
        negative_sampling_probability=np.zeros((1, 3)),
    )
    # The positive's own correction is `log(8)`.
    np.testing.assert_allclose(np.exp(loss) * 8 / 16, 8 + 3, rtol=1e-5)


@pytest.mark.parametrize("m", [0, 1, 5])
def test_true_negatives_match_a_loop(rng, m):
    negative_ids, own_ids = rng.integers(-1, 6, (7, 4)), rng.integers(0, 6, 7)
    positive_ids = rng.integers(-1, 6, (7, m))
    result = batch_logits.true_negatives(*(np.asarray(ids, "int32") for ids in (negative_ids, own_ids, positive_ids)))
    expected = [
        [number not in (-1, own, *positives) for number in row]
        for row, own, positives in zip(negative_ids.tolist(), own_ids, positive_ids.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(result, expected)


def test_positives_are_found_without_a_matrix_of_all_comparisons(rng):
    size, n, m = 128, 16, 64
    ids = rng.integers(0, 99, (size, n)).astype("int32"), rng.integers(0, 99, (size, m)).astype("int32")
    compiled = jax.jit(lambda negative, positive: batch_logits.true_negatives(negative, None, positive)).lower(*ids)
    assert compiled.compile().memory_analysis().temp_size_in_bytes < size * n * m / 4


@pytest.mark.parametrize(("batch", "n"), [(BATCH, 0), (0, 3)])
def test_nothing_to_compare_with(rng, batch, n):
    queries, candidates = embeddings(rng, batch=batch, num_candidates=batch)
    arguments = {
        "candidate_ids": np.zeros(batch, "int32"),
        "positive_ids": np.zeros((batch, 2), "int32"),
        "negative_embeddings": np.zeros((batch, n, DIMENSION), "float32"),
        "negative_ids": np.zeros((batch, n), "int32"),
    }
    loss = DistributedTwoTowerTask()(queries, candidates, **arguments)
    # All candidates have the id of a known positive.
    np.testing.assert_allclose(loss, 0.0)


def test_own_negatives_count_for_the_start_of_streaming(rng, monkeypatch):
    queries, candidates = embeddings(rng)
    negatives = np.zeros((BATCH, 2, DIMENSION), "float32")
    softmax = in_batch_softmax.InBatchSoftmax(None, False, None)
    batch = in_batch_softmax.BatchQueries(queries, negative_embeddings=negatives)
    for least, expected in ((BATCH * (NUM_CANDIDATES + 2), True), (BATCH * (NUM_CANDIDATES + 2) + 1, False)):
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", least)
        assert softmax.streams(batch, in_batch_softmax.BatchCandidates(candidates)) == expected


@pytest.mark.parametrize("is_streamed", [False, True])
def test_bfloat16_negatives_are_scored_in_float32(rng, is_streamed, monkeypatch):
    if is_streamed:
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    queries, candidates = embeddings(rng, None, 6, 9)
    negatives = jax.numpy.asarray(rng.normal(size=(6, 2, DIMENSION)), "bfloat16")
    task = DistributedTwoTowerTask()
    loss, gradient = jax.value_and_grad(lambda n: task(queries, candidates, negative_embeddings=n))(negatives)
    assert (loss.dtype, gradient.dtype) == ("float32", "bfloat16")
    expected = reference.softmax_loss(queries, candidates, negative_embeddings=np.asarray(negatives, "float64"))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_functional_model_takes_negatives_and_can_be_saved(rng, tmp_path):
    shapes = {
        "query_embeddings": ((DIMENSION,), "float32"),
        "candidate_embeddings": ((DIMENSION,), "float32"),
        "candidate_ids": ((), "int32"),
        "negative_embeddings": ((4, DIMENSION), "float32"),
        "negative_ids": ((4,), "int32"),
    }
    inputs = {name: keras.Input(shape, dtype=dtype, name=name) for name, (shape, dtype) in shapes.items()}
    model = keras.Model(inputs, DistributedTwoTowerTask(remove_accidental_hits=True)(**inputs))
    assert model.output_shape == ()
    queries, candidates = embeddings(rng, num_candidates=BATCH)
    arguments = call_arguments(rng, ("candidate_ids", "negative_embeddings", "negative_ids"), num_candidates=BATCH)
    batch = {"query_embeddings": queries, "candidate_embeddings": candidates, **arguments}
    expected = reference.softmax_loss(queries, candidates, remove_accidental_hits=True, **arguments)
    np.testing.assert_allclose(model(batch), expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras")(batch), expected, rtol=1e-5)


NEGATIVES = {"negative_embeddings": np.zeros((BATCH, 2, DIMENSION), "float32")}
IDS = {"negative_ids": np.zeros((BATCH, 2), "int64")}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (IDS, ValueError, "`negative_ids` describes the rows of `negative_embeddings`.*negative_embeddings=None"),
        ({"negative_sampling_probability": np.ones((BATCH, 2))}, ValueError, "`negative_sampling_probability` descr"),
        ({"negative_embeddings": np.zeros((BATCH, 4))}, ValueError, r"\[5, n, 4\].*shape \(5, 4\)"),
        ({"negative_embeddings": np.zeros((BATCH, 2, 3))}, ValueError, r"\[5, n, 4\].*shape \(5, 2, 3\)"),
        ({"negative_embeddings": np.zeros((4, 2, 4))}, ValueError, r"\[5, n, 4\].*\(4, 2, 4\). Pass the same number"),
        ({**NEGATIVES, "negative_ids": np.zeros((BATCH, 3), "int32")}, ValueError, r"\[5, 2\].*-1 for padding"),
        ({**NEGATIVES, "negative_ids": np.zeros(BATCH, "int32")}, ValueError, r"`negative_ids`.*shape \(5,\)"),
        ({**NEGATIVES, "negative_ids": np.zeros((BATCH, 2))}, TypeError, "`negative_ids` must be integers"),
        ({**NEGATIVES, "negative_ids": IDS["negative_ids"] - 2**31 - 1}, ValueError, "`negative_ids`.*-2147483649"),
        ({**NEGATIVES, "negative_sampling_probability": np.ones(2)}, ValueError, r"_probability`.*\[5, 2\]"),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_invalid_negatives_raise(rng, arguments, error, words, symbolic):
    if symbolic and "2147483649" in words:
        pytest.skip("Symbolic tensors have no values.")
    if symbolic:
        arguments = {name: keras.KerasTensor(value.shape, str(value.dtype)) for name, value in arguments.items()}
    with pytest.raises(error, match=words):
        DistributedTwoTowerTask()(*embeddings(rng), **arguments)


@pytest.mark.parametrize("name", ["negative_embeddings", "negative_ids", "negative_sampling_probability"])
def test_labels_exclude_negatives(rng, name):
    arguments = call_arguments(rng, (name,))
    with pytest.raises(ValueError, match=f"`labels` together with `{name}`"):
        DistributedTwoTowerTask()(*embeddings(rng, num_candidates=BATCH), labels=np.ones(BATCH), **arguments)
