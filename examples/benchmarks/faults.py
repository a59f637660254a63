"""Kills, stops and damages trainings with checkpoints, and prints what was tried and what held.

    python examples/benchmarks/faults.py

Each training is a program of its own: this one, with `--train`. It has row-sparse towers, a streaming estimate, a
memory and shuffled data, and prints a checksum of its weights, its optimizer and its history at the end. An undisturbed
training shows which checksum is right. The full disk is a file system of 8 MB in memory if this program may mount one,
and otherwise a limit on the size of files.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import hashlib
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

from absl import app, flags, logging
from timing import Table, print_setting

FLAGS = flags.FLAGS
flags.DEFINE_string("train", None, "Train with checkpoints in this folder, and print a checksum at the end.")
flags.DEFINE_integer("every_steps", 1, "Steps between checkpoints.")
flags.DEFINE_integer("epochs", 15, "Epochs of a training.")
flags.DEFINE_integer("dimension", 16, "Embedding dimension. Another one is another model.")
flags.DEFINE_integer("max_file_bytes", 0, "The largest file that a training can write after its first epoch, or 0.")
flags.DEFINE_integer("kills", 10, "How many times a training is killed.")
flags.DEFINE_integer("seed", 0, "Seed of the moments at which it is killed.")

NUM_ROWS = 20_000
READY = "The first step is done."


def train():
    """Trains, and prints a checksum."""
    logging.set_verbosity(logging.FATAL)
    # A shell may have started this program in the background, where it ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import resource

    import keras
    import numpy as np

    from keras_rs_contrib import CrossBatchMemory, RowSparseEmbedding, TrainingCheckpoint, TwoTowerModel

    class Report(keras.callbacks.Callback):
        """Reports the first step, and limits the size of files after the first epoch."""

        def __init__(self):
            super().__init__()
            # Not a plain value, which a checkpoint would restore.
            self.is_ready = threading.Event()

        def on_train_batch_end(self, batch, logs=None):
            if not self.is_ready.is_set():
                print(READY, flush=True)
            self.is_ready.set()

        def on_epoch_end(self, epoch, logs=None):
            if FLAGS.max_file_bytes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (FLAGS.max_file_bytes, FLAGS.max_file_bytes))

    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x = {name: rng.integers(0, NUM_ROWS, 30_000, "int32") for name in ("user", "movie")}
    towers = [RowSparseEmbedding(NUM_ROWS, FLAGS.dimension) for _ in range(2)]
    model = TwoTowerModel(*towers, "user", "movie", cross_batch_memory=CrossBatchMemory(500), corpus_metrics=[])
    model.compile("adam")
    checkpoint = TrainingCheckpoint(FLAGS.train, every_steps=FLAGS.every_steps)
    history = model.fit(x, batch_size=100, epochs=FLAGS.epochs, verbose=0, callbacks=[checkpoint, Report()])
    digest = hashlib.sha256(repr((history.epoch, history.history)).encode())
    for variable in (*model.variables, *model.optimizer.variables):
        digest.update(np.asarray(variable.value).tobytes())
    print("Checksum:", digest.hexdigest())


class Program:
    """A training in a process of its own.

    Args:
        directory: the folder of its checkpoints.
        **values: values of flags.
    """

    def __init__(self, directory, **values):
        options = [f"--{name}={value}" for name, value in values.items()]
        command = [sys.executable, __file__, f"--train={directory}", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._begun = []

    def wait_for_first_step(self):
        """Waits until a step is done, or the process has ended."""
        for line in self._process.stdout:
            self._begun.append(line)
            if READY in line:
                break
        return self

    def send(self, number):
        """Sends a signal."""
        self._process.send_signal(number)
        return self

    def end(self):
        """Returns the status, the checksum or `None`, and all that was printed, when the process has ended."""
        output, errors = self._process.communicate()
        output = "".join(self._begun) + output
        found = re.search("Checksum: (.*)", output)
        return self._process.returncode, found[1] if found else None, output + errors


def is_writing(directory):
    """Returns whether an incomplete checkpoint remains."""
    return any(path.name.startswith("writing") for path in directory.iterdir())


def newest(directory):
    """Returns the folder of the newest checkpoint."""
    return max(directory.glob("epoch-*"), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


@contextlib.contextmanager
def small_disk(directory):
    """Yields the flags of a training whose disk is full after a while, and what limits it."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            # Each checkpoint takes 5 MB. The first one is complete before the second one begins.
            yield {"every_steps": 1000}, "a file system of 8 MB"
        finally:
            subprocess.run(["umount", str(directory)], check=True)
    else:
        yield {"every_steps": 1000, "max_file_bytes": 100_000}, "files of at most 100 kB after epoch 1"


def main(_):
    """Tries all faults, and prints a table."""
    if FLAGS.train is not None:
        train()
        return
    print_setting("orbax-checkpoint")
    print()
    table = Table()
    draws = random.Random(FLAGS.seed)
    failed = []

    def report(tried, held, details):
        table.print({"tried".ljust(62): tried.ljust(62), "held": "yes" if held else "NO", "details".ljust(60): details})
        failed.extend([] if held else [tried])

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        _, expected, output = Program(folder / "undisturbed", every_steps=10**6).end()
        assert expected is not None, output

        killed, written, directory = 0, 0, folder / "killed"
        for _ in range(FLAGS.kills):
            program = Program(directory).wait_for_first_step()
            time.sleep(draws.uniform(0, 1.5))
            killed += program.send(signal.SIGKILL).end()[0] == -signal.SIGKILL
            written += is_writing(directory)
        checksum = Program(directory).end()[1]
        details = f"{killed} kills, {written} of them while writing; checksum of the undisturbed training"
        report(
            f"SIGKILL at {FLAGS.kills} random moments, then to the end",
            killed == FLAGS.kills and checksum == expected,
            details,
        )

        for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            directory = folder / number.name
            program = Program(directory, every_steps=10**6).wait_for_first_step()
            time.sleep(draws.uniform(0, 1))
            returned, _, output = program.send(number).end()
            saved = newest(directory).name
            checksum = Program(directory).end()[1]
            is_said = f"{number.name}: training has stopped" in output
            details = f"status {returned}, {saved}, then the checksum of the undisturbed training"
            report(f"{number.name}, then to the end", returned == status and is_said and checksum == expected, details)

        directory = folder / "twice"
        program = Program(directory).wait_for_first_step()
        returned, _, _ = program.send(signal.SIGTERM).send(signal.SIGINT).end()
        checksum = Program(directory).end()[1]
        # If the first one has been handled before the second arrives, its status is that of the first.
        report("SIGTERM and SIGINT at once", returned in (130, 143) and checksum == expected, f"status {returned}")

        directory = folder / "disk"
        with small_disk(directory) as (values, limit):
            _, checksum, output = Program(directory, **values).end()
            kept = sorted(path.name for path in directory.glob("epoch-*"))
            is_warned = "A checkpoint must be written as a whole" in output
            held = checksum == expected and is_warned and bool(kept) and not is_writing(directory)
            report(f"full disk: {limit}", held, f"training is complete, a warning, {kept} remain")

        directory = folder / "truncated"
        Program(directory, epochs=14, every_steps=10**6).end()
        Program(directory, every_steps=10**6).end()
        largest = max(newest(directory).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        os.truncate(largest, largest.stat().st_size // 2)
        _, checksum, output = Program(directory).end()
        held = checksum == expected and "is damaged" in output and "The one before it is used" in output
        report("truncated newest checkpoint", held, "said; the one before gives the same checksum")

        def contents():
            files = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
            return {path: path.read_bytes() for path in files}

        before = contents()
        returned, _, output = Program(directory, dimension=8).end()
        held = returned == 1 and "(20160, 16)" in output and "(20160, 8)" in output and before == contents()
        report("another model", held, "both shapes are named, no file has changed")

        directory = folder / "shared"
        first = Program(directory).wait_for_first_step()
        returned, _, output = Program(directory).end()
        checksum = first.end()[1]
        is_rejected = returned == 1 and "belongs to one training at a time" in output
        report("two trainings in one folder", is_rejected and checksum == expected, "the second is rejected")

        returned, _, output = Program("/proc/checkpoints").end()
        held = returned == 1 and "must be a folder in which files can be written" in output and READY not in output
        report("a folder that cannot be written", held, "an error before the first step")
    if failed:
        sys.exit(f"Did not hold: {', '.join(failed)}.")


if __name__ == "__main__":
    app.run(main)
