"""Times TensorFlow Recommenders on request. The benchmarks run this program in an environment that has TFRS.

    pip install tensorflow-recommenders tf_keras

The program prints its versions first. It then reads one JSON request per line, and answers each with a line that holds
the time in seconds. The keys of a request are `task`, `num_candidates`, `num_queries`, `dimension` and `k` for
retrieval, or `task` ("pointwise" or "softmax"), `num_rows`, `batch_size`, `dimension` and `steps` for training steps.
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
    """Returns the table of candidates, equal to that of the benchmarks."""
    return np.random.default_rng(0).normal(size=(num_candidates, dimension)).astype("float32")


@functools.lru_cache(maxsize=2)
def prepared(task, num_candidates, num_queries, dimension, k):
    """Returns the function to time, after its first call, which compiles it."""
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


# Tables are large: keep one model at a time.
@functools.lru_cache(maxsize=1)
def training(task, num_rows, batch_size, dimension, steps):
    """Returns a function that trains for some steps, after its first call, which compiles it."""
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
    """Returns the time of the requested function in seconds, per step if it trains."""
    is_training = request["task"] in ("pointwise", "softmax")
    if is_training and training.cache_info().currsize and request != answer.last:
        # Free the tables before the next ones are created.
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
