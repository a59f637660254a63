"""Candidates without training examples: their sampling probability is 0, and they must not dominate the loss."""

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel
from softmax_cases import embeddings, loss_and_gradients

from keras_rs_contrib import CrossBatchMemory, DistributedTwoTowerTask, MixedNegatives, StreamingSamplingProbability
from keras_rs_contrib.task import in_batch_softmax

# A catalogue of the size of MovieLens 100K with some items that came after training, and its number of examples.
NUM_SEEN, NUM_UNSEEN, NUM_EXAMPLES, BATCH = 1682, 20, 80_000, 1024
NUM_CANDIDATES = NUM_SEEN + NUM_UNSEEN
FORMS = ["full logits", "streamed", "local", "custom loss"]


def popularity():
    weights = 1 / (np.arange(NUM_SEEN) + 20.0)
    return weights / weights.sum()


def probabilities_from_counts(examples):
    return StreamingSamplingProbability(NUM_CANDIDATES, counts=np.bincount(examples, minlength=NUM_CANDIDATES))


def probabilities_from_stream(examples):
    layer = StreamingSamplingProbability(NUM_CANDIDATES)
    for batch in np.split(examples, 10):
        layer(batch, training=True)
    return layer


@pytest.fixture
def batches(rng):
    """Returns training examples, a validation batch, and the same batch with 1% of unseen candidates."""
    examples = rng.choice(NUM_SEEN, NUM_EXAMPLES, p=popularity()).astype("int32")
    seen = rng.choice(NUM_SEEN, BATCH, p=popularity()).astype("int32")
    with_unseen = seen.copy()
    with_unseen[rng.choice(BATCH, BATCH // 100, replace=False)] = NUM_SEEN + np.arange(BATCH // 100)
    return examples, seen, with_unseen


@pytest.fixture
def towers(rng):
    return (0.1 * rng.normal(size=(BATCH, 16))).astype("float32"), rng.normal(size=(NUM_CANDIDATES, 16)).astype(
        "float32"
    )


def use_form(form, monkeypatch):
    """Returns a task whose loss has the form."""
    if form == "streamed":
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
        monkeypatch.setattr(in_batch_softmax, "BLOCK_LOGITS", 2**17)
        monkeypatch.delattr(in_batch_softmax.InBatchSoftmax, "logits")
    if form == "local":
        keras.distribution.set_distribution(data_parallel(2))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True) if form == "custom loss" else None
    negatives = "local" if form == "local" else "global"
    return DistributedTwoTowerTask(loss, remove_accidental_hits=True, negatives=negatives)


@pytest.mark.parametrize(
    ("estimate", "form"),
    [(probabilities_from_stream, "full logits"), *((probabilities_from_counts, form) for form in FORMS)],
)
def test_one_percent_of_unseen_candidates_hardly_changes_the_validation_loss(
    batches, towers, estimate, form, monkeypatch
):
    examples, seen, with_unseen = batches
    queries, table = towers
    layer, task = estimate(examples), use_form(form, monkeypatch)

    def loss(ids, probability):
        return float(task(queries, table[ids], candidate_ids=ids, candidate_sampling_probability=probability))

    assert (np.asarray(layer(with_unseen)) == 0).sum() == BATCH // 100
    before, after = (loss(ids, layer(ids)) for ids in (seen, with_unseen))
    assert abs(after - before) < 0.1
    # Clipped to 1e-6, as if they were that rare, they would dominate the loss of all queries.
    assert loss(with_unseen, np.maximum(layer(with_unseen), 1e-6)) > before + 1


def test_unseen_candidates_of_mixed_negatives_hardly_change_the_validation_loss(batches, towers):
    examples, seen, with_unseen = batches
    queries, table = towers
    layer, task = MixedNegatives(probabilities_from_stream(examples), 64), DistributedTwoTowerTask()
    before, after = (float(task(queries, table[ids], **layer(ids)._asdict())) for ids in (seen, with_unseen))
    assert abs(after - before) < 0.1


@pytest.mark.parametrize("is_new", [False, True])
def test_ids_that_first_occur_in_training_hardly_change_the_loss(batches, towers, is_new):
    """With fixed counts, an id can be unknown in training too, and stays in the memory with its probability."""
    examples, seen, with_unseen = batches
    queries, table = towers
    layer = (probabilities_from_stream if is_new else probabilities_from_counts)(examples)
    task, losses = DistributedTwoTowerTask(remove_accidental_hits=True), []
    for ids in (seen, with_unseen):
        memory = CrossBatchMemory(BATCH)
        for _ in range(2):
            probability = layer(ids, training=True)
            candidates = memory(
                table[ids], candidate_ids=ids, candidate_sampling_probability=probability, training=True
            )
        losses.append(float(task(queries, **candidates._asdict())))
    # A stream counts the batch first, so that a new id has the probability of one example, which is low.
    assert abs(losses[1] - losses[0]) < (0.5 if is_new else 0.1)


def test_an_unseen_candidate_counts_like_one_candidate_of_the_corpus(rng):
    """With all scores 0, the mean of `1 / probability` estimates the number of candidates: 8 seen and 1 unseen."""
    probability = np.array([1 / 8] * 9 + [0.0], "float32")
    queries, candidates = np.zeros((1, 2), "float32"), np.zeros((10, 2), "float32")
    loss = float(DistributedTwoTowerTask()(queries, candidates, candidate_sampling_probability=probability))
    np.testing.assert_allclose(np.exp(loss) * 8 / 10, 9 * 8 / 10 + 1, rtol=1e-5)


def test_padding_is_not_one_of_the_draws(rng):
    queries, candidates = embeddings(rng)
    arguments = {
        "candidate_sampling_probability": np.array([0.2, 0, 0.1, 0.3, 0, 0.2, 0, 0], "float32"),
        "candidate_mask": np.array([True, True, False, True, True, True, False, False]),
    }
    loss, *gradients = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, **arguments)
    arguments["candidate_sampling_probability"][[1, 4]] = 1 / 5
    np.testing.assert_allclose(loss, reference.softmax_loss(queries, candidates, **arguments), rtol=1e-5)
    expected = loss_and_gradients(DistributedTwoTowerTask(), queries, candidates, **arguments)
    for gradient, value in zip(gradients, expected[1:], strict=True):
        np.testing.assert_allclose(gradient, value, rtol=1e-5, atol=1e-7)


def test_an_estimate_without_examples_corrects_nothing(rng):
    queries, candidates = embeddings(rng)
    probability = StreamingSamplingProbability(8)(np.arange(8))
    loss = DistributedTwoTowerTask()(queries, candidates, candidate_sampling_probability=probability)
    np.testing.assert_allclose(loss, DistributedTwoTowerTask()(queries, candidates), rtol=1e-5)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_gradient_of_a_probability_of_zero_is_zero(rng, is_streamed, monkeypatch):
    if is_streamed:
        monkeypatch.setattr(in_batch_softmax, "MIN_STREAMED_LOGITS", 0)
    queries, candidates = embeddings(rng)
    probability = np.array([0.2, 0, 0.1, 0.3, 0, 0.2, 0.1, 0.1], "float32")
    gradient = jax.grad(lambda p: DistributedTwoTowerTask()(queries, candidates, candidate_sampling_probability=p))(
        probability
    )
    np.testing.assert_array_equal(gradient[probability == 0], 0)
    assert np.abs(np.asarray(gradient)[probability > 0]).min() > 0


def test_an_id_out_of_range_still_makes_the_loss_nan(rng):
    queries, candidates = embeddings(rng)
    probability = jax.jit(StreamingSamplingProbability(7, counts=np.ones(7)))(np.arange(8))
    assert np.isnan(DistributedTwoTowerTask()(queries, candidates, candidate_sampling_probability=probability))


@pytest.mark.parametrize("name", ["candidate_sampling_probability", "negative_sampling_probability"])
def test_negative_probabilities_raise(name):
    arguments = {"negative_embeddings": np.ones((2, 2, 3), "float32")}
    arguments[name] = np.log([[0.5, 0.5], [0.5, 0.5]]) if name.startswith("negative") else np.array([-0.5, 0.5])
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0. Received: -0.[56].*not their logarithms"):
        DistributedTwoTowerTask()(np.ones((2, 3), "float32"), np.ones((2, 3), "float32"), **arguments)
