"""Starts a program in several processes on this machine, which train together.

    python examples/launch.py --num_processes=2 examples/movielens_dp.py --epochs=5

Each process gets Keras's environment variables, by which `keras.distribution.initialize()` finds the others. Their
output is printed with the number of the process. If one fails, the others are stopped, and its exit status is returned.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# Seconds from the request to stop until a process is killed: if another one has failed, and if a user or a service
# asks, for a checkpoint.
AFTER_FAILURE, AFTER_SIGNAL = 15, 60

# Starts a Python program that Linux asks to stop if this one dies, even if it was killed.
START_ON_LINUX = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Stopped(Exception):
    """A signal asks to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_stopped(number: int, frame: object) -> None:
    """Handles a signal."""
    raise Stopped(number)


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def print_output(process: subprocess.Popen, number: int, lock: threading.Lock) -> None:
    """Prints the output of a process line by line, with its number."""
    for line in process.stdout:
        with lock:
            sys.stdout.write(f"[{number}] {line}" if line.endswith("\n") else f"[{number}] {line}\n")
            sys.stdout.flush()


def stop(processes: list[subprocess.Popen], number: int, seconds: float) -> None:
    """Sends a signal to the processes that are running, and kills those that do not end.

    Args:
        processes: the processes.
        number: the signal.
        seconds: how long to wait for all of them.
    """
    running = [process for process in processes if process.poll() is None]
    try:
        for process in running:
            process.send_signal(number)
        end = time.monotonic() + seconds
        for process in running:
            process.wait(max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, Stopped):
        # Too late, or a second signal.
        pass
    for process in running:
        process.kill()
        process.wait()


def main() -> int:
    """Starts the processes, waits for them, and returns the exit status of the first that fails, or 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="launch.py --num_processes=N program.py [arguments of the program]"
    )
    parser.add_argument("--num_processes", type=int, required=True, help="number of processes")
    parser.add_argument("program", help="a Python program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    if options.num_processes < 1:
        parser.error(f"--num_processes={options.num_processes}: at least one process is needed")
    if not os.path.isfile(options.program):
        parser.error(f"{options.program}: there is no such file")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, raise_stopped)
    environment = {
        **os.environ,
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{free_port()}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(options.num_processes),
        "PYTHONUNBUFFERED": "1",
    }
    start = [sys.executable, *(["-c", START_ON_LINUX] if sys.platform == "linux" else [])]
    processes, threads, lock = [], [], threading.Lock()
    try:
        for number in range(options.num_processes):
            process = subprocess.Popen(
                [*start, options.program, *options.arguments],
                env={**environment, "KERAS_DISTRIBUTION_PROCESS_ID": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # A signal from the terminal reaches this program alone, which passes it on once.
                start_new_session=True,
            )
            processes.append(process)
            threads.append(threading.Thread(target=print_output, args=(process, number, lock)))
            threads[-1].start()
        status = wait(processes)
        stop(processes, signal.SIGTERM, AFTER_FAILURE)
    except Stopped as stopped:
        stop(processes, stopped.number, AFTER_SIGNAL)
        status = 128 + stopped.number
    for thread in threads:
        thread.join()
    return status


def wait(processes: list[subprocess.Popen]) -> int:
    """Waits until all processes have ended, or one has failed. Returns the exit status."""
    ended = threading.Condition()
    running = set(range(len(processes)))
    failed: list[int] = []

    def watch(number: int) -> None:
        status = processes[number].wait()
        with ended:
            running.discard(number)
            if status:
                failed.append(number)
            ended.notify()

    for number in range(len(processes)):
        threading.Thread(target=watch, args=(number,), daemon=True).start()
    with ended:
        while running and not failed:
            ended.wait()
    if not failed:
        return 0
    status = processes[failed[0]].returncode
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    print(f"Process {failed[0]} has failed ({how}). Stopping the others.", file=sys.stderr)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
