r"""Prints what devices send to each other in training, evaluation and search, and what large clusters need.

    python examples/benchmarks/traffic.py
    python examples/benchmarks/traffic.py --compile=False --num_hosts=16 --num_rows=100000000 --gigabits=25

The first table compares formulas with compiled programs: a training step, a step of `evaluate`, a batch of
`evaluate_queries` and a search, for 2, 4 and 8 virtual CPU devices, each of which may be a host of its own. Nothing is
sent: the collectives are read from the programs. A device sends what algorithms with the least bandwidth need, such as
rings (Thakur, Rabenseifner, Gropp, IJHPCA 2005), and receives as much:

- `2 (P - 1) / P` times the size of an array to add it up over `P` devices (all-reduce),
- `(P - 1) / P` times the size of the whole array to gather or scatter it (all-gather, reduce-scatter, all-to-all).

The other tables apply the formulas to a cluster of `--num_hosts` hosts, with one device each and both tables split
over them. `traffic_cases.py` has the symbols.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Devices that wait for each other must not run out of threads.
os.environ.setdefault("NPROC", "64")

import jax
from absl import app, flags
from cluster import OPTIMIZERS, PROCESSORS, Cluster
from timing import Table, print_setting
from traffic_cases import CASES, Case, Sizes

FLAGS = flags.FLAGS
flags.DEFINE_bool("compile", True, "Compare the formulas with compiled programs, which takes minutes.")
flags.DEFINE_bool("verbose", False, "Print each collective of the compiled programs.")
flags.DEFINE_integer("num_hosts", 64, "Hosts of the cluster.", lower_bound=1)
flags.DEFINE_integer("num_rows", 10**9, "Rows of each of the two tables.", lower_bound=1)
flags.DEFINE_integer("embedding_dim", 128, "Dimension of the tables.", lower_bound=1)
flags.DEFINE_integer("batch_size", 65536, "Queries in the global batch.", lower_bound=1)
flags.DEFINE_integer("k", 100, "Candidates that a search returns for each query.", lower_bound=1)
flags.DEFINE_integer("num_positives", 1, "Positives of each query of `evaluate_queries`.", lower_bound=1)
flags.DEFINE_integer("num_seen", 0, "Candidates that the list of each query leaves out.", lower_bound=0)
flags.DEFINE_integer("num_queries", 1_000_000, "Queries of an evaluation.", lower_bound=1)
flags.DEFINE_float("gigabits", 100.0, "Bandwidth of each host in 10^9 bits per second.", lower_bound=1e-3)

# The default of `shard_candidates`, and one that scores 16 times as many queries at once.
BLOCK_SIZES = (2**26, 2**30)
# From this many logits on each device on, the loss is computed in blocks, as the formulas assume.
MIN_LOGITS = 2**22
# With as many drawn or stored negatives as queries in the batch.
STEPS = {
    "training, `Embedding` on each host": Case("training", "Embedding", "whole"),
    "training, `RowSparseEmbedding` on each host": Case("training", "RowSparseEmbedding", "whole"),
    "training, `RowSparseEmbedding`, split": Case("training"),
    "... with log-q": Case("training", negatives="log-q"),
    "... with `MixedNegatives`, as many as the batch": Case("training", negatives="mixed"),
    "... with `CrossBatchMemory`, as large as the batch": Case("training", negatives="memory"),
    "training, `ShardedEmbedding`, split": Case("training", "ShardedEmbedding"),
    "step of `evaluate`, with log-q": Case("evaluation", negatives="log-q"),
    "batch of `evaluate_queries`": Case("ranks"),
    "search": Case("search"),
}


def size_of(num_bytes):
    """Returns a number of bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:,.3g} {unit}" if num_bytes < 1000 else f"{num_bytes:,.0f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def time_of(seconds):
    """Returns a time with a unit."""
    for unit, factor in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def print_programs():
    """Compares the formulas with compiled programs."""
    sizes, table = Sizes(), Table()
    for case in CASES:
        for num_devices in (2, 4, 8):
            found = case.compiled(num_devices, sizes)
            compiled, formula = sum(each.bytes_sent() for each in found), case.bytes_sent(num_devices, sizes)
            table.print(
                {
                    "program": f"{case.program:<10}",
                    "tables": f"{case.embedding:<18}",
                    "layout": f"{case.layout:<6}",
                    "negatives": f"{case.negatives:<9}",
                    "devices": f"{num_devices:>7}",
                    "compiled, bytes": f"{compiled:>15,.0f}",
                    "formula, bytes": f"{formula:>14,.0f}",
                    "compiled - formula": f"{compiled - formula:,.0f}",
                    "formula": f"{case.formula:<75}",
                }
            )
            for each in found if FLAGS.verbose else []:
                print(f"    {each}: {each.bytes_sent():,.0f} bytes")


def print_memory(cluster):
    """Prints the memory of one table on each host."""
    table = Table()
    for name in (None, *OPTIMIZERS):
        num_bytes = cluster.table_bytes(name)
        row = {
            "one table": f"{f'with `{name}`' if name else 'alone':<23}",
            "on each host": f"{size_of(num_bytes):>12}",
            "in all": f"{size_of(num_bytes * cluster.num_hosts):>8}",
        }
        table.print(row)


def print_steps(cluster):
    """Prints the traffic of each kind of step."""
    table = Table()
    for name, case in STEPS.items():
        num_bytes = cluster.bytes_sent(case)
        table.print(
            {
                "step": f"{name:<51}",
                "each host sends": f"{size_of(num_bytes):>15}",
                f"at {FLAGS.gigabits:g} Gb/s": f"{time_of(cluster.seconds(num_bytes)):>11}",
            }
        )


def print_evaluation(cluster):
    """Prints how long an evaluation takes."""
    num_bytes = cluster.bytes_sent(STEPS["step of `evaluate`, with log-q"]) / cluster.sizes.B * FLAGS.num_queries
    print(
        f"Traffic of {FLAGS.num_queries:,} queries: each host sends {size_of(num_bytes)}, in "
        f"{time_of(cluster.seconds(num_bytes))} at {FLAGS.gigabits:g} Gb/s.\n"
    )
    table = Table()
    for block_size in BLOCK_SIZES:
        at_once = cluster.queries_at_once(block_size)
        row = {
            "block_size": f"2**{block_size.bit_length() - 1}",
            "queries at once": f"{at_once:,}",
            "blocks": f"{-(-FLAGS.num_queries // at_once):>9,}",
        }
        for processor in PROCESSORS:
            row[processor.name] = time_of(cluster.scoring_seconds(FLAGS.num_queries, block_size, processor))
        table.print(row)


def main(_):
    """Prints all tables."""
    sizes = Sizes(
        R=FLAGS.num_rows,
        d=FLAGS.embedding_dim,
        B=FLAGS.batch_size,
        k=FLAGS.k,
        n=FLAGS.num_positives,
        m=FLAGS.num_seen,
        N=FLAGS.batch_size,
        C=FLAGS.batch_size,
    )
    if sizes.B**2 // FLAGS.num_hosts < MIN_LOGITS:
        raise app.UsageError(
            f"Each host needs at least {MIN_LOGITS:,} logits of a batch: XLA splits the loss of smaller batches "
            f"in its own way. Received: --batch_size={sizes.B} for {FLAGS.num_hosts} hosts. Use larger batches."
        )
    cluster = Cluster(FLAGS.num_hosts, FLAGS.gigabits, sizes)
    if FLAGS.compile:
        jax.config.update("jax_num_cpu_devices", 8)
        print_setting()
        print("\nBytes that each device sends, without scalars:\n")
        print_programs()
    print(
        f"\n{FLAGS.num_hosts} hosts, two tables of {sizes.R:,} rows of {sizes.d} dimensions, batches of {sizes.B:,}, "
        f"k={sizes.k}, {sizes.n} positives and {sizes.m} candidates left out for each query.\n"
    )
    print_memory(cluster)
    print()
    print_steps(cluster)
    print()
    print_evaluation(cluster)


if __name__ == "__main__":
    app.run(main)
