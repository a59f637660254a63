"""Several processes on this computer equal one process, and fail together."""

import os
import pathlib
import pickle
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import scenarios
from conftest import data_parallel

from keras_rs_contrib import load_model

ROOT = pathlib.Path(__file__).parent.parent.parent
# On two busy cores.
TIMEOUT = 400
# Faster to compile.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def launch(num_processes, num_devices, folder, kind):
    """Runs the scenarios in several processes, and returns the results of each, and the output."""
    launcher = [sys.executable, str(ROOT / "examples/launch.py"), f"--num_processes={num_processes}"]
    program = [str(ROOT / "tests/processes/scenarios.py"), str(folder), str(num_devices), kind]
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [*launcher, *program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # It stops the processes that it has started.
        process.terminate()
        output, _ = process.communicate()
        pytest.fail(f"Not ready after {TIMEOUT} seconds: {output[-5000:]}")
    if kind == "dies":
        return process.returncode, output
    assert process.returncode == 0, output[-5000:]
    return [pickle.loads((folder / f"{i}.pickle").read_bytes()) for i in range(num_processes)], output


def assert_equal(found, expected):
    for name, values in expected["history"].items():
        np.testing.assert_allclose(found["history"][name], values, rtol=1e-5, err_msg=name)
    for ours, theirs in zip(found["evaluate"], expected["evaluate"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    for name, value in expected["evaluate_queries"].items():
        np.testing.assert_allclose(found["evaluate_queries"][name], value, atol=1e-6)


@pytest.mark.slow
def test_two_processes_with_the_same_data_equal_one_process(tmp_path):
    keras.distribution.set_distribution(data_parallel(4))
    model, _, expected = scenarios.same_for_all(tmp_path)
    model.save(tmp_path / "one.keras")
    (tmp_path / "several.keras").unlink()

    results, output = launch(2, 2, tmp_path, "same")

    for found in results:
        assert_equal(found, expected)
        np.testing.assert_allclose(found["train_on_batch"]["loss"], expected["train_on_batch"]["loss"], rtol=1e-5)
        np.testing.assert_array_equal(found["lists"][:-1], expected["lists"])
        # A file of one process.
        np.testing.assert_array_equal(found["lists"][-1], expected["lists"][-1])
        for ours, theirs in zip(found["scores"], expected["scores"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        for (_, ours), (name, theirs) in zip(found["weights"].items(), expected["weights"].items(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)
    # A file of several processes, in one.
    keras.distribution.set_distribution(None)
    np.testing.assert_array_equal(
        load_model(tmp_path / "several.keras").recommend(scenarios.QUERIES).ids, expected["lists"][-1]
    )
    # Only the first process shows progress.
    assert "[0] Epoch 1/2" in output
    assert "[1] Epoch" not in output

    first, last = (found["errors"] for found in results)
    assert len(first) == 13
    assert first.keys() == last.keys()
    for name, (kind, message) in last.items():
        assert first[name][0] == kind, name
        if name not in ("save", "queries", "methods"):
            assert first[name][1] == f"Process 1 has failed: {kind}: {message}"
    assert last["save"] == ("FileNotFoundError", f"Process 0 has failed: FileNotFoundError: {first['save'][1]}")
    assert first["queries"] == last["queries"]
    assert "same queries" in first["queries"][1]
    assert first["methods"] == last["methods"]
    assert "`recommend` in process 0, and `score` in process 1" in first["methods"][1]
    assert results[0]["after"] == results[1]["after"]
    assert np.isfinite(results[0]["after"]["loss"]).all()

    assert output.count("A checkpoint must be written as a whole. Received: OSError: Process 1 has failed: ") == 2
    assert [found["checkpoints"] for found in results] == [[0, 2], [0, 2]]


@pytest.mark.slow
def test_four_processes_with_their_own_data_equal_one_process(tmp_path):
    keras.distribution.set_distribution(data_parallel(4))
    _, _, expected = scenarios.own_for_each(tmp_path)

    results, _ = launch(4, 1, tmp_path, "own")

    for process, found in enumerate(results):
        assert_equal(found, expected)
        rows = slice(2 * process, 2 * process + 2)
        for ours, theirs in zip(found["lists"], expected["lists"], strict=True):
            np.testing.assert_array_equal(ours, theirs[rows])
        for ours, theirs in zip(found["scores"], expected["scores"], strict=True):
            np.testing.assert_allclose(ours, theirs[rows], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(found["known"], expected["known"], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_processes_resume_after_one_of_them_was_killed(tmp_path):
    keras.distribution.set_distribution(data_parallel(4))
    expected = scenarios.with_checkpoints(tmp_path / "undisturbed", dies=False)

    status, output = launch(2, 2, tmp_path, "dies")
    assert status == 128 + signal.SIGKILL
    assert f"Process 1 has failed (signal {signal.SIGKILL.value}). Stopping the others." in output
    complete = {path.name for path in (tmp_path / "checkpoints").glob("epoch-*")}
    assert complete
    results, output = launch(2, 2, tmp_path, "resumes")

    assert "[0] Training resumes from" in output
    assert "[1] Training resumes" not in output
    for found in results:
        np.testing.assert_allclose(found["history"]["loss"], expected["history"]["loss"], rtol=1e-5)
        for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
