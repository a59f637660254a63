"""The task on the TensorFlow backend: eager, and compiled for batches of any size."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import reference
from softmax_cases import SOFTMAX_CASES, call_arguments, embeddings

SCRIPT = """
    import sys
    import keras, numpy as np, tensorflow as tf
    from keras_rs_contrib import DistributedTwoTowerTask
    assert keras.backend.backend() == "tensorflow"
    arguments = dict(np.load(sys.argv[1]))
    task = DistributedTwoTowerTask(
        similarity="cosine", temperature=0.5, num_hard_negatives=3, remove_accidental_hits=True
    )
    print(float(task(**arguments)))
    signature = {name: tf.TensorSpec((None, *value.shape[1:]), value.dtype) for name, value in arguments.items()}
    compiled = tf.function(lambda given: task(**given), input_signature=[signature])
    print(float(compiled({name: tf.constant(value) for name, value in arguments.items()})))
    print(float(keras.losses.CategoricalCrossentropy(from_logits=True)(*task.labels_and_logits(**arguments))))
    try:
        task(**{**arguments, "sample_weight": -arguments["sample_weight"]})
    except ValueError as error:
        assert "finite and at least 0" in str(error), error
    else:
        raise AssertionError
"""


@pytest.mark.slow
def test_loss_matches_the_reference(rng, tmp_path):
    constructor, names = SOFTMAX_CASES["all"]
    names = [name for name in names if name not in ("candidate_mask", "score_mask")]
    queries, candidates = embeddings(rng)
    arguments = call_arguments(rng, names)
    for name in ("candidate_ids", "positive_ids", "negative_ids"):
        arguments[name] = arguments[name].astype("int32")
    path = tmp_path / "arguments.npz"
    np.savez(path, query_embeddings=queries, candidate_embeddings=candidates, **arguments)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), path],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    eager, compiled, unweighted = map(float, result.stdout.split())
    expected = reference.softmax_loss(queries, candidates, **constructor, **arguments)
    np.testing.assert_allclose([eager, compiled], expected, rtol=1e-5)
    arguments.pop("sample_weight")
    expected = reference.softmax_loss(queries, candidates, **constructor, **arguments)
    np.testing.assert_allclose(unweighted, expected, rtol=1e-5)
