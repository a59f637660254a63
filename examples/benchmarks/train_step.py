r"""Times training steps over growing tables and growing batches: this package, dense Keras, and TFRS.

    python examples/benchmarks/train_step.py --quick
    python examples/benchmarks/train_step.py --tfrs_python=/path/to/another/venv/bin/python --plot=train_step.png

The model has two towers of one embedding each, with Adagrad, and runs in `fit` of each library. The time of a step is
the time of a call of `fit` divided by its number of steps. No batch holds a row twice, so that a step touches the same
number of rows in any table.

Growth is the time divided by the time at the fewest rows. "Same batches" uses the same rows in each table, and shows
the cost of the size of the table. The other columns use random rows, which miss the CPU caches more often in larger
tables.

TFRS needs another Keras, and therefore its own environment. Create one with
`pip install tensorflow-recommenders tf_keras`, and pass its interpreter as `--tfrs_python`. All functions are timed in
turns. Each ratio is the median of the ratios of single turns, with quartiles in parentheses.

Two tables of ten million rows, each with an optimizer slot, take 5 GB here and another 5 GB in TFRS. Use `--rows` for
fewer.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools
import gc
import statistics
import time

import jax
import keras
import numpy as np
from absl import app, flags, logging
from timing import Memory, Table, in_turns, milliseconds, print_setting, ratio, tfrs_peer, timed

from keras_rs_contrib import DistributedTwoTowerTask, RowSparseEmbedding, TwoTowerModel
from keras_rs_contrib.task.in_batch_softmax import BLOCK_LOGITS

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Time only small sizes.")
flags.DEFINE_list(
    "rows", ["1000", "10000", "100000", "1000000", "10000000"], "Numbers of rows to time, for each of the two tables."
)
flags.DEFINE_list("batch_sizes", ["1000", "4096", "16384", "65536"], "Batch sizes to time.")
flags.DEFINE_integer("batch_size", 1000, "Batch size while the number of rows varies.", lower_bound=1)
flags.DEFINE_integer("dimension", 32, "Embedding dimension while the number of rows varies.", lower_bound=1)
flags.DEFINE_integer("batch_dimension", 64, "Embedding dimension while the batch size varies.", lower_bound=1)
flags.DEFINE_integer("dense_rows", 1_000_000, "Maximum number of rows for which dense Keras is timed.")
flags.DEFINE_integer("materialised", 16384, "Maximum batch size for which the loss with all logits is timed.")
flags.DEFINE_integer("turns", 9, "Maximum number of turns: each turn times each function once.", lower_bound=3)
flags.DEFINE_float("seconds", 20.0, "Time limit for each size in seconds, after at least three turns.")
flags.DEFINE_string("tfrs_python", None, "Python interpreter of an environment with TFRS. Without it, TFRS is skipped.")
flags.DEFINE_string("plot", None, "File to write a plot of the results to. Needs matplotlib.")

OBJECTIVES = ("pointwise", "softmax")
LEARNING_RATE = 0.1
# Steps per timed call of `fit`: enough that the overhead of the call does not matter.
STEPS = 100
DENSE_STEPS = 5
# Rows of the tables while batches grow: at least the largest batch, so that no batch needs a row twice.
ROWS_OF_BATCHES = 100_000


def batches(num_rows, batch_size, steps):
    """Returns the features and labels of `steps` batches. No batch holds a row twice."""
    rng = np.random.default_rng(0)
    columns = [
        np.concatenate([rng.choice(num_rows, batch_size, replace=False) for _ in range(steps)]).astype("int32")
        for _ in range(2)
    ]
    return {"user": columns[0], "movie": columns[1], "rating": rng.random(batch_size * steps).astype("float32")}


def model(embedding, num_rows, dimension, objective):
    """Returns a compiled model with two embedding towers."""
    label = "rating" if objective == "pointwise" else None
    towers = [embedding(num_rows, dimension) for _ in range(2)]
    result = TwoTowerModel(*towers, "user", "movie", label=label, corpus_metrics=[])
    result.compile(keras.optimizers.Adagrad(LEARNING_RATE))
    return result


def row_sparse(num_rows, dimension):
    """Returns a row-sparse embedding with the same optimizer as the other models."""
    return RowSparseEmbedding(num_rows, dimension, optimizer=keras.optimizers.Adagrad(LEARNING_RATE))


class Training:
    """A function for `in_turns` that trains a model.

    Args:
        model: a compiled model.
        x: the result of `batches`.
        batch_size: number of rows in a batch.
    """

    def __init__(self, model, x, batch_size):
        self.model, self.batch_size = model, batch_size
        self.steps = len(x["user"]) // batch_size
        self.x = {name: values for name, values in x.items() if name != "rating" or model.label is not None}

    def __call__(self):
        """Trains on all batches, and returns the time per step in seconds."""
        start = time.perf_counter()
        self.model.fit(self.x, batch_size=self.batch_size, shuffle=False, verbose=0)
        return (time.perf_counter() - start) / self.steps

    def memory(self):
        """Returns by how many MiB the process grows during training, without the tables."""
        self()
        gc.collect()
        with Memory() as memory:
            self()
        return memory.grown / 2**20


def over_rows(peer, objective, sizes):
    """Prints the time of a step for each number of rows. Returns the medians in milliseconds by name and size."""
    table, medians = Table(), {}
    size = FLAGS.batch_size
    of_base = batches(sizes[0], size, STEPS)
    base = Training(model(row_sparse, sizes[0], FLAGS.dimension, objective), of_base, size)
    for num_rows in sizes:
        ours = model(row_sparse, num_rows, FLAGS.dimension, objective)
        x = batches(num_rows, size, STEPS)
        functions = {"base": base, "same": Training(ours, of_base, size), "ours": Training(ours, x, size)}
        if num_rows <= FLAGS.dense_rows:
            steps = STEPS if num_rows < 100_000 else DENSE_STEPS
            dense = model(keras.layers.Embedding, num_rows, FLAGS.dimension, objective)
            functions["dense"] = Training(dense, {name: x[name][: steps * size] for name in x}, size)
        if peer is not None:
            functions["TFRS"] = functools.partial(
                peer.time,
                task=objective,
                num_rows=num_rows,
                batch_size=FLAGS.batch_size,
                dimension=FLAGS.dimension,
                steps=STEPS,
            )
        times = in_turns(functions, FLAGS.turns, FLAGS.seconds)
        row = {
            "objective": objective,
            "rows": f"{num_rows:,}",
            "ours, ms": milliseconds(times["ours"]),
            "growth, same batches": ratio(times["same"], times["base"]),
            "growth": ratio(times["ours"], times["base"]),
            "ours, MiB beside the tables": f"{functions['ours'].memory():.0f}",
        }
        row["dense, ms"] = milliseconds(times["dense"]) if "dense" in times else "-"
        row["dense / ours"] = ratio(times["dense"], times["ours"]) if "dense" in times else "-"
        row["dense, MiB"] = f"{functions['dense'].memory():.0f}" if "dense" in times else "-"
        if peer is not None:
            row["TFRS, ms"] = milliseconds(times["TFRS"])
            row["TFRS / ours"] = ratio(times["TFRS"], times["ours"])
        table.print(row)
        for name, values in times.items():
            medians.setdefault(name, {})[num_rows] = statistics.median(values) * 1e3
        # Free the tables before the next ones are created.
        functions = ours = dense = None
        gc.collect()
    return medians


def random_embeddings(batch_size):
    """Returns embeddings of queries and candidates."""
    rng = np.random.default_rng(0)
    size = (batch_size, FLAGS.batch_dimension)
    return [jax.device_put(rng.normal(size=size).astype("float32")) for _ in range(2)]


def loss_and_gradients(task, batch_size):
    """Returns a function that computes the loss and its gradients, and the bytes that it needs besides arguments."""
    embeddings = random_embeddings(batch_size)
    compiled = jax.jit(jax.value_and_grad(task, argnums=(0, 1))).lower(*embeddings).compile()
    return lambda: compiled(*embeddings), compiled.memory_analysis().temp_size_in_bytes


def three_products(batch_size):
    """Returns a function that computes the matrix products of loss and gradients alone, in blocks of the same size."""
    embeddings = random_embeddings(batch_size)
    num_blocks = -(-batch_size // min(batch_size, BLOCK_LOGITS // batch_size))
    missing = -batch_size % num_blocks

    def products(queries, candidates):
        def of_block(of_candidates, rows):
            logits = rows @ candidates.T
            return of_candidates + logits.T @ rows, logits @ candidates

        blocks = jax.numpy.pad(queries, ((0, missing), (0, 0))).reshape(num_blocks, -1, FLAGS.batch_dimension)
        return jax.lax.scan(of_block, jax.numpy.zeros_like(candidates), blocks)

    compiled = jax.jit(products)
    return lambda: compiled(*embeddings)


def over_batches(peer, sizes):
    """Prints the time of a softmax step for each batch size. Returns the medians in milliseconds by name and size."""
    table, medians = Table(), {}
    num_rows = max(ROWS_OF_BATCHES, *sizes)
    # A custom loss receives all logits. This one computes the same values as the default.
    own_loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    rows = model(row_sparse, num_rows, FLAGS.batch_dimension, "softmax")
    for batch_size in sizes:
        ours, ours_bytes = loss_and_gradients(DistributedTwoTowerTask(temperature=10.0), batch_size)
        steps = max(1, 20_000 // batch_size)
        functions = {"ours": timed(ours), "products": timed(three_products(batch_size))}
        functions["step"] = Training(rows, batches(num_rows, batch_size, steps), batch_size)
        if batch_size <= FLAGS.materialised:
            all_logits, all_bytes = loss_and_gradients(DistributedTwoTowerTask(own_loss, temperature=10.0), batch_size)
            functions["all logits"] = timed(all_logits)
            if peer is not None:
                functions["TFRS"] = functools.partial(
                    peer.time,
                    task="softmax",
                    num_rows=num_rows,
                    batch_size=batch_size,
                    dimension=FLAGS.batch_dimension,
                    steps=steps,
                )
        # Without all logits and TFRS, one turn is enough, and takes minutes.
        times = in_turns(functions, FLAGS.turns if batch_size <= FLAGS.materialised else 1, FLAGS.seconds)
        has_all = "all logits" in times
        row = {
            "batch": f"{batch_size:,}",
            "loss, ms": milliseconds(times["ours"]),
            "MiB": f"{ours_bytes / 2**20:.1f}",
            "loss / its 3 products": ratio(times["ours"], times["products"]),
            "all logits, ms": milliseconds(times["all logits"]) if has_all else "-",
            "all logits, MiB": f"{all_bytes / 2**20:.1f}" if has_all else "-",
            "loss / all logits": ratio(times["ours"], times["all logits"]) if has_all else "-",
            "memory / all logits": f"{ours_bytes / all_bytes:.2f}" if has_all else "-",
            "step, ms": milliseconds(times["step"]),
        }
        if peer is not None:
            row["TFRS step, ms"] = milliseconds(times["TFRS"]) if "TFRS" in times else "-"
            row["TFRS / ours"] = ratio(times["TFRS"], times["step"]) if "TFRS" in times else "-"
        table.print(row)
        for name, values in times.items():
            medians.setdefault(name, {})[batch_size] = statistics.median(values) * 1e3
    return medians


def plot(path, rows, batch_medians):
    """Plots the time of a step by number of rows, and by batch size."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.5), constrained_layout=True)
    styles = {
        "same": ("RowSparseEmbedding, same batches", "C3", "D"),
        "ours": ("RowSparseEmbedding", "C0", "o"),
        "dense": ("keras.layers.Embedding", "C1", "s"),
        "TFRS": ("TFRS", "C2", "^"),
    }
    for axis, (objective, medians) in zip(axes[:2], rows.items(), strict=True):
        for name, (label, color, marker) in styles.items():
            if name in medians:
                axis.plot(*zip(*medians[name].items(), strict=True), label=label, color=color, marker=marker)
        axis.set(title=f"{objective.capitalize()}, batches of {FLAGS.batch_size:,}", xlabel="rows of each table")
    labels = {
        "ours": ("loss and gradients, default", "C0", "o"),
        "all logits": ("loss and gradients, with all logits", "C1", "s"),
        "step": ("training step", "C3", "D"),
        "TFRS": ("TFRS, training step", "C2", "^"),
    }
    for name, (label, color, marker) in labels.items():
        if name in batch_medians:
            axes[2].plot(*zip(*batch_medians[name].items(), strict=True), label=label, color=color, marker=marker)
    axes[2].set(title="Softmax over the batch", xlabel="batch size")
    for axis in axes:
        axis.set(xscale="log", yscale="log", ylabel="milliseconds per step")
        axis.grid(alpha=0.3)
        # Below the axes, so that the legend hides no points.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


def main(_):
    """Times each size, prints the tables, and plots them if asked."""
    logging.set_verbosity(logging.WARNING)
    row_sizes = [1000, 100_000] if FLAGS.quick else sorted(int(n) for n in FLAGS.rows)
    batch_sizes = [1000, 4096] if FLAGS.quick else sorted(int(n) for n in FLAGS.batch_sizes)
    if row_sizes[0] < FLAGS.batch_size:
        raise app.UsageError(
            f"A table needs at least as many rows as a batch. Received: --batch_size={FLAGS.batch_size} for "
            f"{row_sizes[0]} rows. Use smaller batches, or more rows."
        )
    print_setting()
    peer = tfrs_peer(FLAGS.tfrs_python)
    rows = {}
    for objective in OBJECTIVES:
        print(f"\nResults by number of rows, batches of {FLAGS.batch_size:,}, {FLAGS.dimension} dimensions:\n")
        rows[objective] = over_rows(peer, objective, row_sizes)
    print(f"\nResults by batch size, softmax over the batch, {FLAGS.batch_dimension} dimensions:\n")
    batch_medians = over_batches(peer, batch_sizes)
    if peer is not None:
        peer.close()
    if FLAGS.plot is not None:
        plot(FLAGS.plot, rows, batch_medians)


if __name__ == "__main__":
    app.run(main)
