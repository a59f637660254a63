"""Signals during training, and a process that is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import keras
import numpy as np
import pytest
from trainings import WriteAtOnce, names_of

from keras_rs_contrib import TrainingCheckpoint
from keras_rs_contrib.checkpoints import agreement, run


@pytest.fixture(autouse=True)
def interruptible():
    """Handles SIGINT as in a terminal. A shell may have started the tests in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


X, Y = np.arange(24.0).reshape(8, 3), np.arange(8.0)


def train(*callbacks, epochs=3):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(X, Y, batch_size=2, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model.get_weights()


class Send(keras.callbacks.Callback):
    """Sends signals to this process, at a batch or at the end of the second epoch."""

    def __init__(self, *numbers, batch=None):
        super().__init__()
        self.numbers, self.batch, self.epoch = numbers, batch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.epoch == 1 and batch == self.batch:
            self._send()

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1 and self.batch is None:
            self._send()

    def _send(self):
        for number in self.numbers:
            signal.raise_signal(number)


@pytest.mark.parametrize(
    ("number", "status", "batch", "place"),
    [
        (signal.SIGTERM, 143, 0, (1, 1)),
        (signal.SIGTERM, 143, None, (2, 0)),
        (signal.SIGINT, 130, 3, (1, 3)),
    ],
    ids=str,
)
def test_a_signal_saves_and_exits_with_a_status_of_its_own(number, status, batch, place, tmp_path, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    expected = train()
    with pytest.raises(SystemExit) as raised:
        train(TrainingCheckpoint(tmp_path, every_epochs=9), Send(number, batch=batch))
    assert raised.value.code == status
    name = "epoch-{}-batch-{}".format(*place)
    assert names_of(tmp_path) == [name]
    assert capsys.readouterr().out.splitlines() == [
        f"{signal.Signals(number).name}: training has stopped. The same command continues. "
        f"{tmp_path / name} is the last good checkpoint."
    ]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    np.testing.assert_equal(train(TrainingCheckpoint(tmp_path)), expected)


def test_a_notice_of_preemption_acts_like_sigterm(tmp_path, monkeypatch):
    expected = train()
    first = next(run._STEP_NUMBERS)
    # JAX names the step at which all processes stop.
    monkeypatch.setattr(agreement, "is_preempted", lambda step: step >= first + 6)
    with pytest.raises(SystemExit) as raised:
        train(TrainingCheckpoint(tmp_path))
    monkeypatch.undo()
    assert raised.value.code == 143
    assert names_of(tmp_path) == ["epoch-1-batch-0", "epoch-1-batch-2"]
    np.testing.assert_equal(train(TrainingCheckpoint(tmp_path)), expected)


class AtOnce(BaseException):
    pass


def test_a_second_signal_exits_at_once(tmp_path, monkeypatch):
    def leave(status):
        assert status == 143
        raise AtOnce

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(AtOnce):
        train(WriteAtOnce(tmp_path), Send(signal.SIGINT, signal.SIGTERM, batch=2))
    assert names_of(tmp_path) == ["epoch-1-batch-0"]


def test_a_signal_after_a_fit_that_has_failed_is_handled_as_before(tmp_path):
    class Fail(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(TrainingCheckpoint(tmp_path), Fail())
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_fit_in_another_thread_leaves_signals_alone(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=train, args=[TrainingCheckpoint(tmp_path)])
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) == handler
    assert names_of(tmp_path) == ["epoch-1-batch-0", "epoch-2-batch-0", "epoch-3-batch-0"]


SCRIPT = """
    import os, signal, sys
    import keras, numpy as np
    from keras_rs_contrib import TrainingCheckpoint

    directory, last_step = sys.argv[1], int(sys.argv[2])

    class Kill(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_begin(self, batch, logs=None):
            self.steps += 1
            # With a checkpoint that is being written.
            if self.steps == last_step:
                os.kill(os.getpid(), signal.SIGKILL)

    def train(*callbacks):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.layers.Embedding(1000, 8), keras.layers.Flatten(), keras.layers.Dense(1)])
        model.compile("adam", "mse")
        rows = np.random.default_rng(0).integers(0, 1000, (400, 3))
        history = model.fit(rows, rows[:, 0] / 1000, batch_size=2, epochs=2, verbose=0, callbacks=list(callbacks))
        return repr((history.history, [each.tobytes() for each in model.get_weights()]))

    resumed = train(TrainingCheckpoint(directory, every_steps=1), Kill())
    print("Equal:", resumed == train())
"""


@pytest.mark.slow
def test_a_killed_process_continues(tmp_path):
    def run(last_step):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), str(last_step)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    killed = run(290)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names_of(tmp_path)
    resumed = run(0)
    assert "Training resumes from" in resumed.stdout, resumed.stderr
    assert "Equal: True" in resumed.stdout
