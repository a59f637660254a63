import functools

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import compilations, data_parallel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from keras_rs_contrib import MeanReciprocalRank, NDCGAtK, RecallAtK

# Each metric, and its reference value for one query.
METRICS = {
    **{f"recall_at_{k}": (RecallAtK(k), functools.partial(reference.recall, k=k)) for k in (3, 1000)},
    **{f"ndcg_at_{k}": (NDCGAtK(k), functools.partial(reference.ndcg, k=k)) for k in (3, 1000)},
    "mean_reciprocal_rank": (MeanReciprocalRank(), reference.reciprocal_rank),
}


@pytest.fixture(params=METRICS)
def metric_and_value(request):
    metric, value = METRICS[request.param]
    return type(metric).from_config(metric.get_config()), value


def random_ranks(rng, num_queries, m=None):
    """Returns ranks, distinct within a query. With several per query, about a third are missing (-1)."""
    if m is None:
        return rng.integers(0, 20, num_queries).astype("int32")
    ranks = np.stack([rng.permutation(4 * m)[:m] for _ in range(num_queries)]).astype("int32")
    ranks[rng.random(ranks.shape) < 0.3] = -1
    return ranks


@pytest.mark.parametrize("m", [None, 1, 7])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_results_match_the_formula(rng, metric_and_value, m, is_weighted):
    metric, value = metric_and_value
    ranks = random_ranks(rng, 40, m)
    sample_weight = rng.choice([0.0, 0.5, 1.0, 3.0], 40) if is_weighted else None
    metric.update_state(ranks, sample_weight=sample_weight)
    np.testing.assert_allclose(metric.result(), reference.mean_over_queries(value, ranks, sample_weight), rtol=1e-6)


@pytest.mark.parametrize(
    ("metric", "ranks", "expected"),
    [
        (RecallAtK(3), [2, 3], 0.5),
        (RecallAtK(2), [[0, 5, 1]], 2 / 3),
        (RecallAtK(1), [[0, 1, 2, 3]], 1 / 4),
        (RecallAtK(5), [[4, -1], [5, -1]], 0.5),
        (NDCGAtK(3), [0, 2, 3], (1 + 0.5 + 0) / 3),
        # Three positives, but two positions: the list is ideal.
        (NDCGAtK(2), [[1, 0, 9]], 1.0),
        (NDCGAtK(5), [[0, 2, -1]], 1.5 / (1 + 1 / np.log2(3))),
        (NDCGAtK(2), [[1, -1, -1]], 1 / np.log2(3)),
        (MeanReciprocalRank(), [0, 1, 9], (1 + 1 / 2 + 1 / 10) / 3),
        (MeanReciprocalRank(), [[7, 3, -1]], 1 / 4),
        (MeanReciprocalRank(), [2**30], 2**-30),
        # Not in the list, which is shorter than k.
        (RecallAtK(100), [2, 2**31 - 1], 0.5),
        (RecallAtK(2**40), [2, 2**31 - 1], 0.5),
        (NDCGAtK(100), [[0, 2**31 - 1]], 1 / (1 + 1 / np.log2(3))),
        (MeanReciprocalRank(), [[2**31 - 1, 1]], 0.5),
        (MeanReciprocalRank(), [2**31 - 1, 0], 0.5),
    ],
)
def test_results_by_hand(metric, ranks, expected):
    metric = type(metric).from_config(metric.get_config())
    metric.update_state(ranks)
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-6)


def test_the_order_of_a_querys_positives_does_not_matter(rng, metric_and_value):
    metric, _ = metric_and_value
    ranks = random_ranks(rng, 40, 7)
    metric.update_state(ranks)
    expected = float(metric.result())
    metric.reset_state()
    metric.update_state(rng.permuted(ranks, axis=1))
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-6)


def test_queries_without_positives_are_not_counted(rng, metric_and_value):
    metric, _ = metric_and_value
    ranks = random_ranks(rng, 10, 7)
    ranks[:, 0] = rng.integers(0, 5, 10)
    metric.update_state(ranks)
    expected = float(metric.result())
    metric.update_state(np.full((40, 7), -1), sample_weight=np.full(40, 9.0))
    assert float(metric.result()) == expected
    assert float(metric.count) == 10


def test_the_result_without_counted_queries_is_zero(metric_and_value):
    metric, _ = metric_and_value
    assert float(metric.result()) == 0
    metric.update_state([-1, -1])
    metric.update_state([[0, 1]], sample_weight=[0.0])
    metric.update_state(np.zeros((0, 2), "int32"))
    assert float(metric.result()) == 0


def test_the_result_does_not_depend_on_the_batches(rng, metric_and_value):
    """A mean of batch means would differ, because the batches and their weights are uneven."""
    metric, value = metric_and_value
    ranks, sample_weight = random_ranks(rng, 100, 7), rng.random(100) * 5
    for rows in np.split(np.arange(100), [40, 50, 90]):
        metric.update_state(ranks[rows], sample_weight=sample_weight[rows])
    np.testing.assert_allclose(metric.result(), reference.mean_over_queries(value, ranks, sample_weight), rtol=1e-6)


def test_reset_state_clears_the_sums(metric_and_value):
    metric, value = metric_and_value
    metric.update_state([0, 15], sample_weight=[3.0, 5.0])
    metric.reset_state()
    assert float(metric.result()) == float(metric.total) == float(metric.count) == 0
    metric.update_state([[1, 4]])
    np.testing.assert_allclose(metric.result(), value([1, 4]), rtol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_the_result_does_not_depend_on_the_number_of_devices(rng, metric_and_value, num_devices):
    metric, value = metric_and_value
    ranks, sample_weight = random_ranks(rng, 29, 3), rng.random(29).astype("float32")
    expected = reference.mean_over_queries(value, ranks, sample_weight)
    keras.distribution.set_distribution(data_parallel(num_devices))
    metric = type(metric).from_config(metric.get_config())
    padding = -29 % num_devices
    # Padding queries have rank 0, which would increase each metric if they did not have weight 0.
    ranks = np.pad(ranks, ((0, padding), (0, 0)))
    sample_weight = np.pad(sample_weight, (0, padding))
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    ranks, weights = jax.device_put((ranks, sample_weight), NamedSharding(mesh, PartitionSpec("batch")))
    assert ranks.addressable_shards[0].data.shape[0] == (29 + padding) // num_devices
    metric.update_state(ranks, sample_weight=weights)
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-6, atol=1e-6)
    assert metric.total.value.sharding.is_fully_replicated
    update = jax.jit(metric.stateless_update_state)
    state = update([v.value for v in metric.variables], ranks, sample_weight=weights)
    np.testing.assert_allclose(metric.stateless_result(state), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state[1], 2 * np.asarray(metric.count.value), rtol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_results_for_random_ranks_match_the_formula(data):
    """Uses few shapes, so that few programs are compiled."""
    num_queries, m = data.draw(st.sampled_from([(1, 1), (4, 3)]))
    k = data.draw(st.sampled_from([1, 2, 100]))
    row = st.lists(
        st.integers(-1, 9) | st.just(2**31 - 1),
        min_size=m,
        max_size=m,
        unique_by=lambda rank: rank if rank >= 0 else object(),
    )
    ranks = np.array(data.draw(st.lists(row, min_size=num_queries, max_size=num_queries)), "int32")
    weights = st.sampled_from([0.0, 0.25, 1.0, 7.0])
    sample_weight = data.draw(st.none() | st.lists(weights, min_size=num_queries, max_size=num_queries))
    for metric, value in (
        (RecallAtK(k), functools.partial(reference.recall, k=k)),
        (NDCGAtK(k), functools.partial(reference.ndcg, k=k)),
        (MeanReciprocalRank(), reference.reciprocal_rank),
    ):
        metric.update_state(ranks, sample_weight=sample_weight)
        expected = reference.mean_over_queries(value, ranks, sample_weight)
        np.testing.assert_allclose(metric.result(), expected, rtol=1e-5)
        assert 0 <= float(metric.result()) <= 1 + 1e-6


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint32"])
@pytest.mark.parametrize("name", ["recall_at_3", "ndcg_at_3", "mean_reciprocal_rank"])
def test_ranks_may_be_integers_of_any_width(name, dtype):
    metric, value = METRICS[name]
    metric = type(metric).from_config(metric.get_config())
    metric.update_state(np.array([[0, 5], [3, 100]], dtype))
    np.testing.assert_allclose(metric.result(), (value([0, 5]) + value([3, 100])) / 2, rtol=1e-6)


def test_values_of_uncounted_queries_may_be_nan_or_infinite():
    """Uses a subclass with the value NaN for weight 0, and an infinite value for no positive."""

    class Inverse(MeanReciprocalRank):
        def values(self, ranks):
            return 1 / keras.ops.cast(ranks[:, 0] + 1, "float32") * keras.ops.where(ranks[:, 0] == 5, np.nan, 1.0)

    metric = Inverse()
    metric.update_state([1, -1, 5], sample_weight=[1.0, 1.0, 0.0])
    assert float(metric.result()) == 0.5


def test_values_of_a_subclass_may_be_computed_on_the_host():
    class OnHost(RecallAtK):
        def values(self, ranks):
            return np.asarray(ranks)[:, 0].astype("float32")

    metric = OnHost(3)
    metric.update_state([4, -1, 6])
    assert float(metric.result()) == 5.0


def test_metrics_with_equal_settings_share_a_program():
    ranks = np.array([[0, 5, 7], [3, 100, -1]], "int32")
    NDCGAtK(17).update_state(ranks)
    with compilations() as found:
        NDCGAtK(17, name="another").update_state(ranks)
    assert not found
    other, expected = NDCGAtK(2), [reference.ndcg([0, 5, 7], k=2), reference.ndcg([3, 100], k=2)]
    other.update_state(ranks)
    np.testing.assert_allclose(other.result(), np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize("metric", [metric for metric, _ in METRICS.values()], ids=list(METRICS))
def test_metrics_round_trip(metric):
    assert metric.name in METRICS
    for restored in (
        type(metric).from_config(metric.get_config()),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric)),
    ):
        assert type(restored) is type(metric)
        assert restored.get_config() == metric.get_config()
        assert getattr(restored, "k", None) == getattr(metric, "k", None)


def test_config_keeps_name_dtype_and_numpy_k():
    metric = NDCGAtK(np.int64(5), name="best", dtype="float64")
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert (restored.name, restored.k, type(restored.k)) == ("best", 5, int)
    assert restored.dtype == "float64"
    assert NDCGAtK(np.int64(5)).name == "ndcg_at_5"
    assert RecallAtK().k == NDCGAtK().k == 10


@pytest.mark.parametrize("metric", [RecallAtK, NDCGAtK])
@pytest.mark.parametrize("k", [0, -1, 2.0, "3", None, True])
def test_k_must_be_a_positive_int(metric, k):
    with pytest.raises(ValueError, match=rf"`k` must be a positive int. Received: k={k!r}"):
        metric(k)


@pytest.mark.parametrize(
    ("ranks", "sample_weight", "error", "words"),
    [
        ([0.0, 1.0], None, TypeError, "dtype float32"),
        ([True, False], None, TypeError, "dtype bool"),
        (3, None, ValueError, r"shape \(\)"),
        (np.zeros((2, 2, 2), "int32"), None, ValueError, r"shape \(2, 2, 2\)"),
        ([1, 2], [1.0], ValueError, r"shape \(1,\) for 2 queries"),
        ([1, 2], [[1.0], [1.0]], ValueError, r"shape \(2, 1\) for 2 queries"),
        ([[1, 2]], [1.0, 1.0], ValueError, r"shape \(2,\) for 1 queries"),
        ([1, 2], 1.0, ValueError, r"shape \(\) for 2 queries"),
    ],
)
def test_invalid_arguments_raise_and_change_no_state(metric_and_value, ranks, sample_weight, error, words):
    metric, _ = metric_and_value
    metric.update_state([0])
    with pytest.raises(error, match=words):
        metric.update_state(ranks, sample_weight=sample_weight)
    assert float(metric.count) == 1


@pytest.mark.parametrize("metric", [RecallAtK(1000), NDCGAtK(1000)])
def test_k_may_exceed_the_range_of_the_dtype_of_ranks(metric):
    metric.update_state(np.array([0, 0], "int8"))
    assert float(metric.result()) == 1


def test_ranks_without_columns_have_no_positives():
    metric = MeanReciprocalRank()
    metric.update_state(np.zeros((3, 0), "int32"))
    assert float(metric.result()) == 0
