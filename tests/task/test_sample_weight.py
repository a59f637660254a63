"""Sample weights that would turn a loss around, or make it NaN, are errors where their values are known."""

import jax
import keras
import numpy as np
import pytest
from conftest import data_parallel
from softmax_cases import BATCH, NUM_CANDIDATES, embeddings

from keras_rs_contrib import DistributedTwoTowerTask, MeanReciprocalRank, NDCGAtK, RecallAtK

WRONG = {"negative": -0.5, "nan": np.nan, "infinite": np.inf}
LOSSES = {
    "softmax": (DistributedTwoTowerTask, {}),
    "pointwise": (DistributedTwoTowerTask, {"labels": np.ones(BATCH, "float32")}),
    "custom": (lambda: DistributedTwoTowerTask(keras.losses.CategoricalCrossentropy(from_logits=True)), {}),
}
KINDS = {
    "list": list,
    "float64": lambda weight: weight,
    "JAX": jax.numpy.asarray,
    "bfloat16": lambda weight: jax.numpy.asarray(weight, "bfloat16"),
}


def weights_with(wrong):
    weights = np.linspace(0, 2, BATCH)
    weights[3] = wrong
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", WRONG)
def test_negative_and_not_finite_weights_raise(rng, wrong, loss, kind):
    make_task, arguments = LOSSES[loss]
    weights = KINDS[kind](weights_with(WRONG[wrong]))
    words = rf"`sample_weight` must be finite and at least 0. Received: {WRONG[wrong]} for row 3. Use 0 for a row"
    with pytest.raises(ValueError, match=words):
        make_task()(*embeddings(rng, num_candidates=BATCH), sample_weight=weights, **arguments)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_that_are_split_over_devices_raise(rng, wrong):
    distribution = data_parallel(5)
    keras.distribution.set_distribution(distribution)
    weights = jax.device_put(weights_with(WRONG[wrong]), distribution.get_data_layout((BATCH,)).backend_layout)
    with pytest.raises(ValueError, match="for row 3"):
        DistributedTwoTowerTask()(*embeddings(rng, num_candidates=BATCH), sample_weight=weights)


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_of_padding_rows_may_be_anything(rng, wrong):
    queries, candidates = embeddings(rng)
    mask = np.arange(NUM_CANDIDATES) != 3
    task, weights = DistributedTwoTowerTask(), weights_with(WRONG[wrong]).astype("float32")
    expected = task(queries, candidates, sample_weight=weights_with(7.0), candidate_mask=mask)
    np.testing.assert_array_equal(task(queries, candidates, sample_weight=weights, candidate_mask=mask), expected)


def test_values_that_are_traced_are_not_checked(rng):
    queries, candidates = embeddings(rng)
    task = jax.jit(lambda weight: DistributedTwoTowerTask()(queries, candidates, sample_weight=weight))
    np.testing.assert_allclose(task(-np.ones(BATCH)), -task(np.ones(BATCH)), rtol=1e-6)
    assert np.isnan(task(weights_with(np.nan)))


@pytest.mark.parametrize("metric", [RecallAtK(2), NDCGAtK(2), MeanReciprocalRank()], ids=lambda metric: metric.name)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_of_metrics_raise_and_change_no_state(metric, wrong):
    metric.reset_state()
    with pytest.raises(ValueError, match=f"Received: {WRONG[wrong]} for row 1"):
        metric.update_state([0, 3], sample_weight=[1.0, WRONG[wrong]])
    assert float(metric.count) == 0
