r"""Serves requests of changing sizes, and counts what is compiled: this package, and Keras RS.

    python examples/benchmarks/serving.py --num_calls=100000
    python examples/benchmarks/serving.py --server

The first command calls `recommend` with 1 to 64 queries and 0 to 32 excluded ids, in turns with calls of one size. Then
it calls the layer of Keras RS, which excludes nothing, in turns with `recommend` on as many queries. The second command
loads `examples/serve.py` with concurrent clients, with and without shared searches, in turns.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import array
import asyncio
import contextlib
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import ClassVar

import jax
import keras
import keras_rs
import numpy as np
from absl import app, flags, logging
from timing import Memory, Table, print_setting, ratio

from keras_rs_contrib import TwoTowerModel

MAX_QUERIES, MAX_EXCLUDED, K = 64, 32, 10
NUM_USERS = 10_000
# After these calls, caches are full, and memory should no longer grow.
NUM_FIRST_CALLS = 1_000
TURNS = 8

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_calls", 100_000, "Number of calls of changing sizes.", lower_bound=2 * NUM_FIRST_CALLS)
flags.DEFINE_integer("num_candidates", 20_000, "Number of candidates.", lower_bound=MAX_QUERIES)
flags.DEFINE_integer("dimension", 32, "Dimension of the embeddings.", lower_bound=1)
flags.DEFINE_bool("server", False, "Load `examples/serve.py` instead of calling the model.")
flags.DEFINE_integer("num_clients", 32, "With --server, the number of concurrent clients.", lower_bound=1)
flags.DEFINE_integer("num_requests", 16_000, "With --server, the number of requests to each server.", lower_bound=TURNS)
flags.DEFINE_integer("seed", 0, "Seed of the embeddings and the requests.")


def make_model():
    """Returns a model with random embeddings."""
    keras.utils.set_random_seed(FLAGS.seed)
    towers = [keras.layers.Embedding(number, FLAGS.dimension) for number in (NUM_USERS, FLAGS.num_candidates)]
    model = TwoTowerModel(*towers, "user_id", "movie_id")
    model({"user_id": np.arange(1), "movie_id": np.arange(1)})
    return model


class Calls:
    """The times and the compilations of calls.

    Attributes:
        compiled: the events of all compilations so far.
        seconds: the time of each call.
        num_compiled: the number of compilations in all calls.
    """

    compiled: ClassVar[Counter] = Counter()

    def __init__(self):
        # As a list, 100,000 times would show in the memory.
        self.seconds, self.num_compiled = array.array("d"), 0

    def time(self, function, *args, **kwargs):
        """Calls a function, which waits for its result."""
        before, start = self.compiled.total(), time.perf_counter()
        function(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        self.num_compiled += self.compiled.total() - before

    def row(self, name, memory=""):
        """Returns the row of a table."""
        median, high = np.quantile(self.seconds, [0.5, 0.99]) * 1e3
        return {
            "calls of": f"{name:<57}",
            "number": f"{len(self.seconds):,}".rjust(7),
            "compilations": str(self.num_compiled),
            "p50, ms": f"{median:.2f}",
            "p99, ms": f"{high:.2f}",
            "slowest, ms": f"{max(self.seconds) * 1e3:.1f}".rjust(7),
            "memory": memory.rjust(7),
        }


def note_compilation(event, duration, **_):
    """Counts compilations of JAX."""
    if "backend_compile" in event:
        Calls.compiled[event] += 1


def benchmark_calls():
    """Prints the compilations and times of calls of changing sizes."""
    model, rng = make_model(), np.random.default_rng(FLAGS.seed)
    jax.monitoring.register_event_duration_secs_listener(note_compilation)
    num_programs = model.warm_up(MAX_QUERIES, MAX_EXCLUDED)
    print(f"Warm-up: {num_programs} programs, {Calls.compiled.total()} compilations.", flush=True)

    def users(number):
        return {"user_id": rng.integers(0, NUM_USERS, number)}

    def excluded(number, num_excluded):
        return rng.integers(0, FLAGS.num_candidates, (number, num_excluded))

    changing, fixed = Calls(), Calls()
    progress = keras.utils.Progbar(FLAGS.num_calls, unit_name="call")
    for call in range(FLAGS.num_calls):
        if call == NUM_FIRST_CALLS:
            before = Memory.resident()
        number, num_excluded = rng.integers(1, MAX_QUERIES + 1), rng.integers(0, MAX_EXCLUDED + 1)
        changing.time(model.recommend, users(number), K, exclude_ids=excluded(number, num_excluded))
        if call % 10 == 0:
            number, num_excluded = MAX_QUERIES // 2, MAX_EXCLUDED // 2
            fixed.time(model.recommend, users(number), K, exclude_ids=excluded(number, num_excluded))
        if call % 1000 == 999 or call + 1 == FLAGS.num_calls:
            progress.update(call + 1)
    grown = Memory.resident() / before - 1

    table = keras.ops.convert_to_numpy(model.candidate_tower.embeddings)
    user_table = keras.ops.convert_to_numpy(model.query_tower.embeddings)
    layer = keras_rs.layers.BruteForceRetrieval(k=K)
    layer.update_candidates(table)

    def search(embeddings):
        return [np.asarray(each) for each in layer(embeddings)]

    ours, theirs = Calls(), Calls()
    before = Memory.resident()
    for _ in range(FLAGS.num_calls // 10):
        features = users(rng.integers(1, MAX_QUERIES + 1))
        ours.time(model.recommend, features, K)
        theirs.time(search, user_table[features["user_id"]])
    results = Table()
    sizes = f"1 to {MAX_QUERIES} queries, 0 to {MAX_EXCLUDED} excluded"
    results.print(changing.row(f"`recommend`, {sizes}", f"{grown:+.2%}"))
    results.print(fixed.row(f"`recommend`, {MAX_QUERIES // 2} queries, {MAX_EXCLUDED // 2} excluded"))
    results.print(ours.row(f"`recommend`, 1 to {MAX_QUERIES} queries"))
    grown = Memory.resident() / before - 1
    results.print(theirs.row(f"`BruteForceRetrieval` of Keras RS, 1 to {MAX_QUERIES} queries", f"{grown:+.2%}"))
    print(f"Changing sizes take {ratio_of_medians(changing, fixed)} of the time of one size, and Keras RS", end=" ")
    print(f"{ratio_of_medians(theirs, ours)} of the time of `recommend`, by medians.")


def ratio_of_medians(calls, others):
    """Returns the ratio of the median times, formatted."""
    return f"{np.median(calls.seconds) / np.median(others.seconds):.2f}"


@contextlib.contextmanager
def serving(path, *arguments):
    """Starts `examples/serve.py`, and yields its port."""
    program = pathlib.Path(__file__).parents[1] / "serve.py"
    command = [sys.executable, program, f"--model_path={path}", "--port=0", f"--max_k={K}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = None
        for line in process.stdout:
            address = re.search(r"http://[^ ]*:(\d+)\.", line)
            port = int(address[1]) if address else port
            if line.strip() == "Ready.":
                break
        else:
            sys.exit(f"The server ended with status {process.wait()}.")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


async def client(port, targets, seconds):
    """Requests one target after the other on one connection, and notes the time of each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for target in targets:
        start = time.perf_counter()
        writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        if not head.startswith(b"HTTP/1.1 200 "):
            sys.exit(f"The server answered {head.splitlines()[0]!r} to {target}.")
        seconds.append(time.perf_counter() - start)
    writer.close()
    await writer.wait_closed()


def load(port, targets, seconds):
    """Returns the time that all clients together need for their targets."""

    async def run():
        clients = (client(port, targets[number :: FLAGS.num_clients], seconds) for number in range(FLAGS.num_clients))
        await asyncio.gather(*clients)

    start = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - start


def benchmark_server():
    """Prints the times of two servers, with and without shared searches."""
    rng = np.random.default_rng(FLAGS.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = pathlib.Path(folder) / "model.keras"
        make_model().save(path)
        arguments = {f"shared by up to {MAX_QUERIES}": f"--max_batch={MAX_QUERIES}", "not shared": "--max_batch=1"}
        ports = {name: stack.enter_context(serving(path, argument)) for name, argument in arguments.items()}
        turns, latencies = {name: [] for name in ports}, {name: [] for name in ports}
        per_turn = FLAGS.num_requests // TURNS
        for turn in range(TURNS + 1):
            for name, port in ports.items():
                ids = rng.integers(0, FLAGS.num_candidates, (per_turn, 4))
                targets = [f"/recommend?user_id={user}&exclude={a},{b},{c}" for user, a, b, c in ids % NUM_USERS]
                seconds = []
                turns[name].append(load(port, targets, seconds))
                # The first turn fills caches.
                latencies[name] += seconds if turn else []
        times = {name: each[1:] for name, each in turns.items()}
    results, shared = Table(), next(iter(times))
    for name, each in times.items():
        median, high = np.quantile(latencies[name], [0.5, 0.99]) * 1e3
        results.print(
            {
                "searches": f"{name:<15}",
                "requests / s": f"{per_turn / np.median(each):,.0f}",
                "time / shared": ratio(each, times[shared]),
                "p50, ms": f"{median:.1f}",
                "p99, ms": f"{high:.1f}",
            }
        )


def main(argv):
    """Prints the setting and the table of the flags."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    logging.set_verbosity(logging.ERROR)
    print_setting("starlette", "uvicorn")
    if FLAGS.server:
        benchmark_server()
    else:
        benchmark_calls()


if __name__ == "__main__":
    app.run(main)
