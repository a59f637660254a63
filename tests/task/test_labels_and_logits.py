"""`labels_and_logits`: what in-batch metrics compare, as TFRS's `batch_metrics` do."""

import ast
import textwrap

import jax
import keras
import numpy as np
import pytest
import reference
from conftest import data_parallel
from softmax_cases import BATCH, SOFTMAX_CASES, call_arguments, embeddings

import keras_rs_contrib
from keras_rs_contrib import DistributedTwoTowerTask
from keras_rs_contrib.task import logits as batch_logits


def rows_of(labels, logits):
    """Returns the logits of each query as `reference.softmax_rows`: the positive first, without masked negatives."""
    labels, logits = np.asarray(labels), np.asarray(logits)
    assert ((labels == 1).sum(axis=1) == 1).all()
    rows = []
    for label, row in zip(labels, logits, strict=True):
        negatives = row[(label == 0) & (row > batch_logits.MASKED)]
        rows.append([row[label == 1][0], *sorted(negatives.tolist(), reverse=True)])
    return rows


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("case", SOFTMAX_CASES)
def test_logits_match_the_reference(rng, case, heads):
    constructor, names = SOFTMAX_CASES[case]
    queries, candidates = embeddings(rng, heads)
    arguments = call_arguments(rng, names)
    result = DistributedTwoTowerTask(**constructor).labels_and_logits(queries, candidates, **arguments)
    assert [array.dtype for array in result] == ["float32", "float32"]
    valid = np.ones(BATCH, bool)
    if "candidate_mask" in arguments:
        valid = arguments["candidate_mask"][:BATCH]
    arguments.pop("sample_weight", None)
    expected = reference.softmax_rows(queries, candidates, **constructor, **arguments)
    for label, row, logits, is_valid in zip(*result, expected, valid, strict=True):
        if is_valid:
            np.testing.assert_allclose(rows_of(label[None], row[None])[0], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_accuracy_counts_the_positives_among_the_first_k(rng, k):
    constructor, names = SOFTMAX_CASES["log-q"]
    queries, candidates = embeddings(rng)
    arguments = call_arguments(rng, names)
    metric = keras.metrics.TopKCategoricalAccuracy(k)
    metric.update_state(*DistributedTwoTowerTask(**constructor).labels_and_logits(queries, candidates, **arguments))
    rows = reference.softmax_rows(queries, candidates, **constructor, **arguments)
    expected = np.mean([sum(negative > positive for negative in negatives) < k for positive, *negatives in rows])
    assert 0 < expected < 1
    np.testing.assert_allclose(metric.result(), expected)


def test_padding_has_no_weight_in_a_metric_that_gets_the_mask(rng):
    queries, candidates = embeddings(rng, batch=9, num_candidates=9)
    mask = np.arange(9) < 6
    task, results = DistributedTwoTowerTask(), []
    for rows, weight in ((slice(None), mask), (slice(6), None)):
        metric = keras.metrics.TopKCategoricalAccuracy(2)
        pairs = task.labels_and_logits(queries[rows], candidates[rows], candidate_mask=mask[rows])
        metric.update_state(*pairs, sample_weight=weight)
        results.append(float(metric.result()))
    assert results[0] == results[1] > 0


@pytest.mark.parametrize("num_hard_negatives", [None, 2])
def test_the_loss_is_that_of_the_logits(rng, num_hard_negatives):
    queries, candidates = embeddings(rng)
    arguments = call_arguments(rng, ("candidate_ids", "positive_ids", "negative_embeddings", "negative_ids"))
    task = DistributedTwoTowerTask(num_hard_negatives=num_hard_negatives, remove_accidental_hits=True)
    labels, logits = jax.jit(task.labels_and_logits)(queries, candidates, **arguments)
    assert labels.shape == logits.shape == (BATCH, 12 if num_hard_negatives is None else 3)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)(labels, logits)
    np.testing.assert_allclose(task(queries, candidates, **arguments), loss, rtol=1e-5)


@pytest.mark.parametrize("negatives", ["global", "local"])
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_devices_agree(rng, num_devices, negatives):
    constructor, names = SOFTMAX_CASES["own negatives with ids"]
    queries, candidates = embeddings(rng, batch=24, num_candidates=32)
    arguments = call_arguments(rng, names, 24, 32)
    keras.distribution.set_distribution(data_parallel(num_devices))
    task = DistributedTwoTowerTask(negatives=negatives, **constructor)
    labels, logits = task.labels_and_logits(queries, candidates, **arguments)
    size = 24 // num_devices if negatives == "local" else 24
    assert labels.shape == (24, size + 8 + 4)
    expected = []
    for first in range(0, 24, size):
        rows, columns = slice(first, first + size), [*range(first, first + size), *range(24, 32)]
        part = {
            name: value[columns] if name in reference.BY_CANDIDATE else value[rows] for name, value in arguments.items()
        }
        expected += reference.softmax_rows(queries[rows], candidates[columns], **constructor, **part)
    for row, logits_of_row in zip(rows_of(labels, logits), expected, strict=True):
        np.testing.assert_allclose(row, logits_of_row, rtol=1e-4, atol=1e-5)


class ModelWithBatchMetrics(keras.Model):
    def __init__(self):
        super().__init__()
        self.towers = [keras.layers.Embedding(9, 4), keras.layers.Embedding(9, 4)]
        self.task = DistributedTwoTowerTask(remove_accidental_hits=True)
        self.accuracy = keras.metrics.TopKCategoricalAccuracy(2, name="in_batch_accuracy")

    def call(self, x):
        return [tower(x[name]) for tower, name in zip(self.towers, ("user", "movie"), strict=True)]

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return self.task(*y_pred, candidate_ids=x["movie"])

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.accuracy.update_state(*self.task.labels_and_logits(*y_pred, candidate_ids=x["movie"]))
        return self.get_metrics_result()


def test_a_model_reports_an_in_batch_metric(rng):
    model = ModelWithBatchMetrics()
    model.compile(keras.optimizers.Adam(0.1))
    x = {"user": np.arange(8), "movie": np.arange(8)[::-1]}
    history = model.fit(x, batch_size=8, epochs=30, verbose=0).history["in_batch_accuracy"]
    assert history[0] < history[-1] == 1
    assert model.evaluate(x, batch_size=8, verbose=0, return_dict=True)["in_batch_accuracy"] == 1


def test_the_example_of_the_docstring_runs():
    text = textwrap.dedent(DistributedTwoTowerTask.labels_and_logits.__doc__.split("```python\n")[1].split("```")[0])
    ast.parse(text)
    exec(text, {"keras": keras, **vars(keras_rs_contrib)})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": np.ones(BATCH)}, ValueError, "`labels_and_logits` returns.*Received: `labels`. Remove them"),
        ({"candidate_ids": np.arange(4)}, ValueError, r"`candidate_ids`.*shape \(4,\)"),
        ({"candidate_ids": np.arange(BATCH) + 2**31}, ValueError, "`candidate_ids`.*2147483648"),
        ({"positive_ids": np.zeros((BATCH, 2))}, TypeError, "`positive_ids` must be integers"),
        ({"sample_weight": -np.ones(BATCH)}, ValueError, "`sample_weight` must be finite and at least 0"),
        ({"candidate_id": np.arange(BATCH)}, TypeError, "candidate_id"),
    ],
)
def test_invalid_arguments_raise(rng, arguments, error, words):
    with pytest.raises(error, match=words):
        DistributedTwoTowerTask().labels_and_logits(*embeddings(rng, num_candidates=BATCH), **arguments)


def test_symbolic_tensors_raise():
    with pytest.raises(TypeError, match=r"symbolic tensors of a functional model.*`compute_metrics`"):
        DistributedTwoTowerTask().labels_and_logits(keras.Input((4,)), keras.Input((4,)))
