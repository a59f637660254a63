"""Times peers in turns, some of them in a process of their own, and prints what was timed and where."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax


def in_turns(functions: dict[str, Callable[[], float]], turns: int, seconds: float) -> dict[str, list[float]]:
    """Returns how long each function took, in seconds, called one after the other, turn by turn.

    Args:
        functions: take nothing, return how long they took.
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


def print_table(rows: list[dict[str, str]]) -> None:
    """Prints rows of one kind as a table in Markdown, which reads as text too."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [names, ["-" * (width - 1) + ":" for width in widths], *([row[name] for name in names] for row in rows)]
    for line in lines:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |")


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
        program: path of the program; it reads one JSON request a line and answers each with one line of JSON.
    """

    def __init__(self, python: str, program: str) -> None:
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process = subprocess.Popen(
            [python, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, **request: Any) -> Any:
        """Returns the answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"The peer process ended with status {self._process.wait()} on the request {request}.")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
