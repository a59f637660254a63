"""TensorFlow Recommenders, timed on request; run by the benchmarks in an environment that has it.

    pip install tensorflow-recommenders tf_keras

Reads one JSON request a line, `{"task", "num_candidates", "num_queries", "dimension", "k"}`, and answers with seconds.
The first line that it prints says which versions it runs.
"""

import functools
import json
import sys
import time

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

BLOCK = 4096


@functools.lru_cache(maxsize=1)
def table(num_candidates, dimension):
    """Returns the candidates that the benchmarks use too."""
    return np.random.default_rng(0).normal(size=(num_candidates, dimension)).astype("float32")


@functools.lru_cache(maxsize=2)
def prepared(task, num_candidates, num_queries, dimension, k):
    """Returns what is to be timed, its first and slowest call behind it."""
    queries = tf.constant(np.random.default_rng(1).normal(size=(num_queries, dimension)).astype("float32"))
    candidates = table(num_candidates, dimension)
    if task == "BruteForce":
        index = tfrs.layers.factorized_top_k.BruteForce(k=k).index(tf.constant(candidates))
        function = tf.function(lambda: index(queries))
    elif task == "Streaming":
        dataset = tf.data.Dataset.from_tensor_slices(candidates).batch(BLOCK).cache()
        index = tfrs.layers.factorized_top_k.Streaming(k=k).index_from_dataset(dataset)
        function = tf.function(lambda: index(queries))
    else:
        dataset = tf.data.Dataset.from_tensor_slices(candidates).batch(BLOCK).cache()
        metric = tfrs.metrics.FactorizedTopK(candidates=dataset, ks=(1, 10, k))
        targets = np.random.default_rng(2).integers(0, num_candidates, num_queries)
        positives = tf.constant(candidates[targets])

        @tf.function
        def function():
            metric.update_state(queries, positives)

    function()
    return function


print(json.dumps(f"tensorflow {tf.__version__}, tensorflow-recommenders {tfrs.__version__}"), flush=True)
for line in sys.stdin:
    function = prepared(**json.loads(line))
    start = time.perf_counter()
    result = function()
    tf.nest.map_structure(lambda tensor: tensor.numpy() if hasattr(tensor, "numpy") else None, result)
    print(json.dumps(time.perf_counter() - start), flush=True)
