"""Times peers in turns, some of them in a process of their own, and prints what was timed and where."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax


def in_turns(functions: dict[str, Callable[[], float]], turns: int, seconds: float) -> dict[str, list[float]]:
    """Returns how long each function took, in seconds, called one after the other, turn by turn.

    What is timed follows a call of its own that is not: caches and allocator are as in a run of such calls, and not as
    another function left them.

    Args:
        functions: take nothing, return how long they took; NaN where they could not.
        turns: at most so many.
        seconds: after these, and at least three turns, no further one begins.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for turn in range(turns):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            function()
            times[name].append(function())
    return times


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Returns a function that says how long `function` takes, in seconds, its result ready."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    return run


def milliseconds(times: list[float]) -> str:
    """Returns the median."""
    return f"{statistics.median(times) * 1e3:.2f}"


def ratio(times: list[float], others: list[float]) -> str:
    """Returns the median of the turns' ratios, and their quartiles."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


class Memory:
    """Watches how much this process grows, on Linux, from within `with` to its end.

    Attributes:
        grown: bytes, the most that it had beyond those at the start.
    """

    def __enter__(self) -> "Memory":
        self.grown = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._resident(),))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self, before: int) -> None:
        while not self._end.wait(0.005):
            self.grown = max(self.grown, self._resident() - before)

    @staticmethod
    def _resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Table:
    """A table in Markdown, which reads as text too, printed row by row: what was timed is not lost with what fails."""

    def __init__(self) -> None:
        self._widths: list[int] = []

    def print(self, row: dict[str, str]) -> None:
        """Prints a row, under its names if it is the first."""
        if not self._widths:
            self._widths = [max(len(name), len(cell)) + 1 for name, cell in row.items()]
            self._print_line(list(row))
            self._print_line(["-" * (width - 1) + ":" for width in self._widths])
        self._print_line(list(row.values()))

    def _print_line(self, cells: list[str]) -> None:
        padded = [cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)]
        print("| " + " | ".join(padded) + " |", flush=True)


def print_setting(*packages: str) -> None:
    """Prints the device and the versions of packages."""
    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    if device.platform == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        processor = models[0] if models else processor
    print(f"Device: {device.platform} {device.device_kind}, {processor}, {os.cpu_count()} cores")
    versions = []
    for package in ("jax", "keras", "keras-rs", *packages):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    print(f"Python {platform.python_version()}, " + ", ".join(versions))


class Peer:
    """A program that times something in a process of its own, when it is told to.

    Args:
        python: the interpreter, of an environment that has what the program needs.
        program: path of the program; it prints its versions, then reads one JSON request a line and answers each with
            one line of JSON.

    Attributes:
        versions: what the program says of itself.
    """

    def __init__(self, python: str, program: str) -> None:
        self._command = [python, program]
        self._start()

    def _start(self) -> None:
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=nothing, text=True, env=environment
        )
        self.versions = self._answer()
        if self.versions is None:
            sys.exit(f"The peer does not start. Run it to see why: {' '.join(self._command)}")

    def time(self, **request: Any) -> float:
        """Returns the answer to a request, in seconds; NaN where the program ended over it, for want of memory say."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            print(f"The peer ended with status {self._process.wait()} over {request}.", file=sys.stderr)
            self._start()
            return math.nan
        return float(answer)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def tfrs_peer(python: str | None) -> Peer | None:
    """Returns TFRS, run by an interpreter that has it, and prints its versions, or that it is left out."""
    if python is None:
        print("No --tfrs_python: TFRS is left out.")
        return None
    peer = Peer(python, str(pathlib.Path(__file__).with_name("tfrs_peer.py")))
    print(f"In a process of its own: {peer.versions}")
    return peer
