"""TensorFlow Recommenders, timed on request; run by the benchmarks in an environment that has it.

    pip install tensorflow-recommenders tf_keras

Reads one JSON request a line and answers with seconds. For retrieval a request is `{"task", "num_candidates",
"num_queries", "dimension", "k"}`; for a step of training, of task "pointwise" or "softmax", it is `{"task", "num_rows",
"batch_size", "dimension", "steps"}`. The first line that it prints says which versions it runs.
"""

import functools
import gc
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


class TwoTowers(tfrs.Model):
    """Two embeddings and a task."""

    def __init__(self, num_rows, dimension, objective):
        super().__init__()
        self.users = tf.keras.layers.Embedding(num_rows, dimension)
        self.movies = tf.keras.layers.Embedding(num_rows, dimension)
        self.is_pointwise = objective == "pointwise"
        if self.is_pointwise:
            self.task = tfrs.tasks.Ranking(loss=tf.keras.losses.MeanSquaredError())
        else:
            self.task = tfrs.tasks.Retrieval()

    def compute_loss(self, inputs, training=False):
        """Returns the loss of a batch."""
        users, movies = self.users(inputs["user"]), self.movies(inputs["movie"])
        if self.is_pointwise:
            scores = tf.reduce_sum(users * movies, axis=1, keepdims=True)
            return self.task(labels=inputs["rating"][:, None], predictions=scores)
        return self.task(users, movies, compute_metrics=False)


# One at a time: tables are large.
@functools.lru_cache(maxsize=1)
def training(task, num_rows, batch_size, dimension, steps):
    """Returns a function that trains for some steps, what is slow at first behind it."""
    rng = np.random.default_rng(0)
    users, movies = (
        np.concatenate([rng.choice(num_rows, batch_size, replace=False) for _ in range(steps)]) for _ in range(2)
    )
    data = {"user": users, "movie": movies, "rating": rng.random(batch_size * steps).astype("float32")}
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(batch_size).cache()
    model = TwoTowers(num_rows, dimension, task)
    model.compile(optimizer=tf.keras.optimizers.Adagrad(0.1))
    model.fit(dataset, verbose=0)
    return lambda: model.fit(dataset, verbose=0) and None


def answer(request):
    """Returns how long what is asked for took, in seconds."""
    is_training = request["task"] in ("pointwise", "softmax")
    if is_training and training.cache_info().currsize and request != answer.last:
        # Before the next tables are made.
        training.cache_clear()
        gc.collect()
    answer.last = request
    function = (training if is_training else prepared)(**request)
    start = time.perf_counter()
    result = function()
    tf.nest.map_structure(lambda tensor: tensor.numpy() if hasattr(tensor, "numpy") else None, result)
    return (time.perf_counter() - start) / request.get("steps", 1)


answer.last = None
print(json.dumps(f"tensorflow {tf.__version__}, tensorflow-recommenders {tfrs.__version__}"), flush=True)
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
