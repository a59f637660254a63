"""Times functions in turns, some of them in another process, and prints results, devices and versions."""

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
    """Returns the times of each function in seconds, one for each turn. A turn calls each function once.

    Before each timed call, the function is called without timing, so that the state of the caches and the allocator
    does not depend on the other functions.

    Args:
        functions: functions without arguments that return their own time in seconds, or NaN if they failed.
        turns: maximum number of turns.
        seconds: time limit. After it, and after at least three turns, no further turn begins.
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
    """Returns a function that calls `function`, waits for its result, and returns the time in seconds."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    return run


def milliseconds(times: list[float]) -> str:
    """Returns the median of times in seconds, formatted in milliseconds."""
    return f"{statistics.median(times) * 1e3:.2f}"


def ratio(times: list[float], others: list[float]) -> str:
    """Returns the median and the quartiles of the ratios `times[i] / others[i]`, formatted.

    A single turn has no quartiles.
    """
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


class Memory:
    """Context manager that measures how much the resident memory of this process grows. Linux only.

    Attributes:
        grown: the peak in bytes, minus the memory at the start.
    """

    def __enter__(self) -> "Memory":
        self.grown = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self.resident(),))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self, before: int) -> None:
        while not self._end.wait(0.005):
            self.grown = max(self.grown, self.resident() - before)

    @staticmethod
    def resident() -> int:
        """Returns the resident memory of this process in bytes."""
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Table:
    """A Markdown table, printed row by row, so that a later failure does not lose earlier rows."""

    def __init__(self) -> None:
        self._widths: list[int] = []

    def print(self, row: dict[str, str]) -> None:
        """Prints a row. The first row also prints the column names."""
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
    """A program in another process that times functions on request.

    Args:
        python: Python interpreter of an environment with the requirements of the program.
        program: path of the program. It prints its versions, then reads one JSON request per line, and answers each
            with one line of JSON.

    Attributes:
        versions: the versions that the program has printed.
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
            sys.exit(f"The peer did not start. Run it to see the error: {' '.join(self._command)}")

    def time(self, **request: Any) -> float:
        """Returns the answer to a request in seconds, or NaN if the program exited, for instance out of memory."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            print(f"The peer exited with status {self._process.wait()} on request {request}.", file=sys.stderr)
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
    """Starts TFRS in another process and prints its versions, or returns `None` without an interpreter."""
    if python is None:
        print("No --tfrs_python: TFRS is skipped.")
        return None
    peer = Peer(python, str(pathlib.Path(__file__).with_name("tfrs_peer.py")))
    print(f"In another process: {peer.versions}")
    return peer
