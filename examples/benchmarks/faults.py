"""Kills, stops and damages trainings with checkpoints, and prints what was tried and what held.

    python examples/benchmarks/faults.py

Each training is a program of its own: this one, with `--train`, in one process and in two. It has row-sparse towers, a
streaming estimate, a memory and shuffled data, and prints a checksum of its weights, its optimizer and its history at
the end. An undisturbed training shows which checksum is right. The full disk is a file system of 8 MB in memory if this
program may mount one, and otherwise a limit on the size of files.
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
import socket
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
flags.DEFINE_integer("epochs", 15, "Epochs of a training in one process.")
flags.DEFINE_integer("epochs_of_several", 3, "Epochs of a training in several processes, whose steps take longer.")
flags.DEFINE_integer("dimension", 16, "Embedding dimension. Another one is another model.")
flags.DEFINE_integer("max_file_bytes", 0, "The largest file that a training can write after its first epoch, or 0.")
flags.DEFINE_integer("limited_process", -1, "The process to which the limit on files applies, or -1 for all.")
flags.DEFINE_integer("nan_epoch", 0, "The epoch, from 1, in which a table becomes infinite and the loss NaN, or 0.")
flags.DEFINE_integer("num_processes", 1, "Processes of a training.")
flags.DEFINE_integer("process_id", 0, "Number of this one, from 0.")
flags.DEFINE_integer("port", 0, "Port of the first process.")
flags.DEFINE_list("processes", ["1", "2"], "Numbers of processes of the trainings to try.")
flags.DEFINE_integer("kills", 10, "How many times a training of one process is killed.")
flags.DEFINE_integer("kills_of_several", 3, "How many times one of several processes is killed.")
flags.DEFINE_integer("seed", 0, "Seed of the moments at which it is killed.")

NUM_ROWS, NUM_PADDED_ROWS = 20_000, 20_160
READY = "The first step is done."


def train():
    """Trains, and prints a checksum."""
    logging.set_verbosity(logging.FATAL)
    # A shell may have started this program in the background, where it ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import resource

    import jax
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

        def on_epoch_begin(self, epoch, logs=None):
            if epoch + 1 == FLAGS.nan_epoch:
                self.model.query_tower.embeddings.assign(np.full((NUM_PADDED_ROWS, FLAGS.dimension), np.inf))

        def on_epoch_end(self, epoch, logs=None):
            if FLAGS.max_file_bytes and FLAGS.limited_process in (-1, FLAGS.process_id):
                resource.setrlimit(resource.RLIMIT_FSIZE, (FLAGS.max_file_bytes, FLAGS.max_file_bytes))

    if FLAGS.num_processes > 1:
        # A process that says nothing for so long counts as lost.
        address, timeout = f"127.0.0.1:{FLAGS.port}", {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 30}
        jax.distributed.initialize(address, FLAGS.num_processes, FLAGS.process_id, **timeout)
        keras.distribution.set_distribution(keras.distribution.DataParallel())
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
    """A training in one or several processes of its own.

    Args:
        folder: where the output of the processes is kept.
        directory: the folder of its checkpoints.
        num_processes: the number of processes.
        **values: values of flags.
    """

    def __init__(self, folder, directory, num_processes, **values):
        options = [f"--{name}={value}" for name, value in values.items()]
        command = [sys.executable, __file__, f"--train={directory}", f"--num_processes={num_processes}", *options]
        # JAX names a process that is missing in its log of errors.
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2" if num_processes > 1 else "3"}
        port = free_port()
        self._files, self._processes = [], []
        for number in range(num_processes):
            descriptor, name = tempfile.mkstemp(dir=folder)
            self._files.append(pathlib.Path(name))
            with os.fdopen(descriptor, "w") as file:
                own = [f"--port={port}", f"--process_id={number}"]
                process = subprocess.Popen([*command, *own], env=environment, stdout=file, stderr=subprocess.STDOUT)
                self._processes.append(process)

    def wait_for_first_step(self):
        """Waits until a step is done in each process, or it has ended."""
        for file, process in zip(self._files, self._processes, strict=True):
            while READY not in file.read_text(errors="replace") and process.poll() is None:
                time.sleep(0.02)
        return self

    def send(self, signal_number, process=None):
        """Sends a signal to a process, or to all."""
        for each in self._processes if process is None else [self._processes[process]]:
            each.send_signal(signal_number)
        return self

    def end(self):
        """Returns what there is when the processes have ended.

        Returns:
            The status of each process; the checksum, or `None` unless all have printed the same one; and what each has
            printed.
        """
        statuses = [process.wait() for process in self._processes]
        outputs = [file.read_text(errors="replace") for file in self._files]
        found = [re.search("Checksum: (.*)", output) for output in outputs]
        checksums = {each[1] if each else None for each in found}
        return statuses, checksums.pop() if len(checksums) == 1 else None, outputs


def free_port():
    """Returns a port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_writing(directory):
    """Returns whether an incomplete checkpoint remains."""
    return any(path.name.startswith("writing") for path in directory.iterdir())


def newest(directory):
    """Returns the folder of the newest checkpoint."""
    return max(directory.glob("epoch-*"), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


@contextlib.contextmanager
def small_disk(directory, every_steps):
    """Yields the flags of a training whose disk is full after a while, and what limits it."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            # Each checkpoint takes 5 MB. The first one is complete before the second one begins.
            yield {"every_steps": every_steps}, "a file system of 8 MB"
        finally:
            subprocess.run(["umount", str(directory)], check=True)
    else:
        yield {"every_steps": every_steps, "max_file_bytes": 100_000}, "files of at most 100 kB after epoch 1"


class Trials:
    """Tries all faults on trainings in some number of processes, and prints what held.

    Args:
        folder: a new folder.
        num_processes: the number of processes of each training.
        table: where the rows are printed.

    Attributes:
        failed: what has not held.
    """

    def __init__(self, folder, num_processes, table):
        self.folder, self.num_processes, self.table = folder, num_processes, table
        self.epochs = FLAGS.epochs if num_processes == 1 else FLAGS.epochs_of_several
        self.draws = random.Random(FLAGS.seed)
        self.failed = []
        folder.mkdir()
        (folder / "output").mkdir()
        _, self.expected, outputs = self.program("undisturbed", every_steps=10**6).end()
        assert self.expected is not None, outputs

    def program(self, directory, **values):
        """Starts a training with checkpoints in a folder."""
        # Several processes wait for each checkpoint before they begin the next one.
        values = {"epochs": self.epochs, "every_steps": 1 if self.num_processes == 1 else 50, **values}
        return Program(self.folder / "output", self.folder / directory, self.num_processes, **values)

    def is_right(self, directory, **values):
        """Returns whether a training, resumed, ends with the checksum of the undisturbed one."""
        return self.program(directory, **values).end()[1] == self.expected

    def report(self, tried, held, details):
        """Prints a row."""
        row = {
            "tried".ljust(54): tried.ljust(54),
            "processes": str(self.num_processes),
            "held": "yes" if held else "NO",
        }
        self.table.print({**row, "details".ljust(80): details})
        self.failed.extend([] if held else [f"{tried} ({self.num_processes} processes)"])

    def kills(self):
        """Kills a process at random moments. Others must end by themselves, and name it."""
        killed, writing, named, seconds = 0, 0, 0, [0.0]
        num_kills = FLAGS.kills if self.num_processes == 1 else FLAGS.kills_of_several
        for _ in range(num_kills):
            program = self.program("killed").wait_for_first_step()
            time.sleep(self.draws.uniform(0, 1.5))
            start = time.monotonic()
            # Not the first: it tells the others who is missing.
            program.send(signal.SIGKILL, self.num_processes - 1)
            statuses, _, outputs = program.end()
            seconds.append(time.monotonic() - start)
            killed += statuses[-1] == -signal.SIGKILL and 0 not in statuses
            name = re.compile(rf"task[: ]{self.num_processes - 1}\b", re.IGNORECASE)
            named += all(map(name.search, outputs[:-1]))
            writing += is_writing(self.folder / "killed")
        details = f"{killed} kills, {writing} of them while writing"
        if self.num_processes > 1:
            details += f"; the others end after at most {max(seconds):.0f} s, and name it"
        held = killed == named == num_kills and max(seconds) < 60 and self.is_right("killed")
        self.report(f"SIGKILL to one at {num_kills} random moments, then to the end", held, details)

    def stops(self):
        """Asks to stop."""
        for number, receiver, status in (
            (signal.SIGTERM, self.num_processes - 1, 143),
            (signal.SIGINT, None, 130),
        ):
            program = self.program(number.name, every_steps=10**6).wait_for_first_step()
            time.sleep(self.draws.uniform(0, 1))
            statuses, _, outputs = program.send(number, receiver).end()
            saved = newest(self.folder / number.name).name
            held = set(statuses) == {status} and f"{number.name}: training has stopped" in outputs[0]
            held &= self.is_right(number.name)
            to = "" if self.num_processes == 1 else " to all" if receiver is None else " to one"
            self.report(f"{number.name}{to}, then to the end", held, f"status {statuses}, {saved}")
        program = self.program("twice").wait_for_first_step()
        statuses, _, _ = program.send(signal.SIGTERM).send(signal.SIGINT).end()
        # If the first one has been handled before the second arrives, its status is that of the first.
        held = all(status in (130, 143, -signal.SIGTERM, -signal.SIGINT) for status in statuses)
        self.report("SIGTERM and SIGINT at once", held and self.is_right("twice"), f"status {statuses}")

    def disk(self):
        """Lets the disk run full."""
        directory = self.folder / "disk"
        with small_disk(directory, every_steps=75 * self.epochs) as (values, limit):
            _, checksum, outputs = self.program("disk", **values).end()
            kept = sorted(path.name for path in directory.glob("epoch-*"))
            is_warned = "A checkpoint must be written as a whole" in outputs[0]
            held = checksum == self.expected and is_warned and bool(kept) and not is_writing(directory)
            self.report(f"full disk: {limit}", held, f"training is complete, a warning, {kept} remain")
        if self.num_processes == 1:
            return
        limits = {"max_file_bytes": 100_000, "limited_process": self.num_processes - 1}
        _, checksum, outputs = self.program("limited", every_steps=75 * self.epochs, **limits).end()
        kept = sorted(path.name for path in (self.folder / "limited").glob("epoch-*"))
        is_warned = f"Received: OSError: Process {self.num_processes - 1} has failed" in outputs[0]
        held = checksum == self.expected and is_warned and bool(kept)
        self.report("one process cannot write after epoch 1", held, f"training is complete, a warning, {kept} remain")

    def folders(self):
        """Damages a checkpoint, and uses the folder of another training, or one where nothing can be written."""
        directory = self.folder / "truncated"
        self.program("truncated", epochs=self.epochs - 1, every_steps=10**6).end()
        self.program("truncated", every_steps=10**6).end()
        largest = max(newest(directory).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        os.truncate(largest, largest.stat().st_size // 2)
        _, checksum, outputs = self.program("truncated").end()
        held = checksum == self.expected and "is damaged" in outputs[0] and "The one before it is used" in outputs[0]
        self.report("truncated newest checkpoint", held, "said; the one before is used")

        def contents():
            files = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
            return {path: path.read_bytes() for path in files}

        before = contents()
        statuses, _, outputs = self.program("truncated", dimension=8).end()
        held = set(statuses) == {1} and before == contents()
        held &= all("(20160, 16)" in output and "(20160, 8)" in output for output in outputs)
        self.report("another model", held, "both shapes are named, no file has changed")

        first = self.program("shared").wait_for_first_step()
        statuses, _, outputs = self.program("shared").end()
        held = set(statuses) == {1} and all("belongs to one training at a time" in output for output in outputs)
        held &= first.end()[1] == self.expected
        self.report("two trainings in one folder", held, "the second is rejected")

        statuses, _, outputs = self.program("/proc/checkpoints").end()
        held = set(statuses) == {1} and READY not in outputs[0]
        held &= all("must be a folder in which files can be written" in output for output in outputs)
        self.report("a folder that cannot be written", held, "an error before the first step")

    def losses(self):
        """Lets the loss become NaN."""
        statuses, _, outputs = self.program("nan", every_steps=10**6, nan_epoch=3).end()
        held = set(statuses) == {1} and not list((self.folder / "nan").glob("epoch-*"))
        held &= all("loss=nan in epoch 3, after batch 1" in output for output in outputs)
        self.report(
            "a loss that is NaN, before any checkpoint", held and "There is no good" in outputs[0], "no checkpoint"
        )
        self.program("nan", epochs=2, every_steps=10**6).end()
        statuses, _, outputs = self.program("nan", every_steps=10**6, nan_epoch=3).end()
        held = set(statuses) == {1} and all("loss=nan in epoch 3, after batch 1" in output for output in outputs)
        held &= f"{self.folder / 'nan' / 'epoch-2-batch-0'} is the last good checkpoint" in outputs[0]
        self.report("a loss that is NaN, then to the end", held and self.is_right("nan"), "the last good one is named")


def main(_):
    """Tries all faults, and prints a table."""
    if FLAGS.train is not None:
        train()
        return
    print_setting("orbax-checkpoint")
    print()
    table, failed = Table(), []
    with tempfile.TemporaryDirectory() as folder:
        for num_processes in map(int, FLAGS.processes):
            trials = Trials(pathlib.Path(folder) / str(num_processes), num_processes, table)
            for trial in (trials.kills, trials.stops, trials.disk, trials.folders, trials.losses):
                trial()
            failed += trials.failed
    if failed:
        sys.exit(f"Did not hold: {', '.join(failed)}.")


if __name__ == "__main__":
    app.run(main)
