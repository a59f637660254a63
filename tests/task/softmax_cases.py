"""Settings and arguments of the in-batch softmax, for the tests of its forms: full logits, streamed, local."""

import jax
import numpy as np

BATCH, EXTRA, DIMENSION = 5, 3, 4
NUM_CANDIDATES = BATCH + EXTRA

# Constructor arguments, and the names of the call arguments used with them.
SOFTMAX_CASES = {
    "plain": ({}, ()),
    "cosine": ({"similarity": "cosine"}, ()),
    "biased cosine": ({"similarity": "biased_cosine"}, ("negative_embeddings",)),
    "temperature": ({"temperature": 0.3}, ()),
    "log-q": ({}, ("candidate_sampling_probability",)),
    "accidental hits": ({"remove_accidental_hits": True}, ("candidate_ids",)),
    "score mask": ({}, ("score_mask",)),
    "candidate mask": ({}, ("candidate_mask",)),
    "hard negatives": ({"num_hard_negatives": 2}, ()),
    "more hard negatives than candidates": ({"num_hard_negatives": 50}, ()),
    "sample weight": ({}, ("sample_weight",)),
    "known positives": ({}, ("candidate_ids", "positive_ids")),
    "own negatives": ({}, ("negative_embeddings",)),
    "own negatives with ids": (
        {"remove_accidental_hits": True},
        ("candidate_ids", "negative_embeddings", "negative_ids", "negative_sampling_probability"),
    ),
    "all": (
        {"similarity": "cosine", "temperature": 0.5, "num_hard_negatives": 3, "remove_accidental_hits": True},
        (
            "candidate_sampling_probability",
            "candidate_ids",
            "score_mask",
            "candidate_mask",
            "sample_weight",
            "positive_ids",
            "negative_embeddings",
            "negative_ids",
            "negative_sampling_probability",
        ),
    ),
}


def call_arguments(rng, names=None, batch=BATCH, num_candidates=NUM_CANDIDATES):
    score_mask = rng.random((batch, num_candidates)) < 0.7
    score_mask[np.arange(batch), np.arange(batch)] = True
    candidate_mask = np.ones(num_candidates, bool)
    candidate_mask[[1, num_candidates - 1]] = False
    probability = rng.uniform(1e-3, 1, num_candidates).astype("float32")
    probability[[2, num_candidates - 2]] = 0
    arguments = {
        "candidate_sampling_probability": probability,
        "candidate_ids": 1000 * rng.integers(0, 4, num_candidates),
        "score_mask": score_mask,
        "candidate_mask": candidate_mask,
        "sample_weight": rng.uniform(0, 2, batch).astype("float32"),
        "positive_ids": np.maximum(1000 * rng.integers(-1, 9, (batch, 3)), -1),
        "negative_embeddings": rng.normal(size=(batch, 4, DIMENSION)).astype("float32"),
        "negative_ids": np.maximum(1000 * rng.integers(-1, 9, (batch, 4)), -1),
        "negative_sampling_probability": rng.choice([0, 1e-3, 0.2, 1.0], (batch, 4)).astype("float32"),
    }
    return {name: arguments[name] for name in (arguments if names is None else names)}


def embeddings(rng, heads=None, batch=BATCH, num_candidates=NUM_CANDIDATES):
    query_shape = (batch, DIMENSION) if heads is None else (batch, heads, DIMENSION)
    return rng.normal(size=query_shape).astype("float32"), rng.normal(size=(num_candidates, DIMENSION)).astype(
        "float32"
    )


def loss_and_gradients(task, queries, candidates, **arguments):
    """Returns loss and gradients, compiled as in `fit`."""
    function = jax.jit(jax.value_and_grad(lambda q, c: task(q, c, **arguments), argnums=(0, 1)))
    loss, gradients = function(queries, candidates)
    return np.asarray(loss), *(np.asarray(g) for g in gradients)
