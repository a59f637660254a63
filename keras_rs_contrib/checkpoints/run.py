"""One `fit` with checkpoints: what happens at its beginning, before each step, after each epoch, and at its end."""

from __future__ import annotations

import itertools
import math
import pathlib
import signal
import warnings
from typing import Any, NoReturn

import keras
import numpy as np

from keras_rs_contrib import _keras, processes
from keras_rs_contrib.checkpoints import agreement
from keras_rs_contrib.checkpoints.callback_states import CallbackStates
from keras_rs_contrib.checkpoints.calling_fit import CallingFit
from keras_rs_contrib.checkpoints.lock import FolderLock
from keras_rs_contrib.checkpoints.losses import Loss, Losses
from keras_rs_contrib.checkpoints.model_state import (
    described,
    knowledge_of,
    saved_variables,
    set_knowledge,
    variables_of,
    vocabularies_of,
)
from keras_rs_contrib.checkpoints.opening import check_can_resume, check_same_model, checksum, open_folder
from keras_rs_contrib.checkpoints.plain_values import Array
from keras_rs_contrib.checkpoints.randomness import random_state, set_random_state
from keras_rs_contrib.checkpoints.schedule import Schedule
from keras_rs_contrib.checkpoints.signals import StopSignals
from keras_rs_contrib.checkpoints.steps import TOO_FEW, Steps
from keras_rs_contrib.checkpoints.store import Place, Store
from keras_rs_contrib.model.finite_loss import not_finite

# The states of random generators in a checkpoint, those of all processes.
RANDOM = ("random", "random_at_begin", "random_at_first")
# Of all trainings in this process: JAX needs numbers that grow.
_STEP_NUMBERS = itertools.count(1)


class Run:
    """A `fit` that writes checkpoints, and that has resumed from one if there is one.

    Args:
        model: the model, built.
        fit: the call of `fit`.
        epochs: the number of epochs of `fit`.
        directory: the folder of the checkpoints.
        schedule: when checkpoints are due.
        keep: the number of checkpoints that remain.
    """

    def __init__(
        self,
        model: keras.Model,
        fit: CallingFit,
        epochs: int,
        directory: pathlib.Path,
        schedule: Schedule,
        keep: int,
    ) -> None:
        agreement.check_distribution()
        check_can_resume(fit)
        self.model = model
        self._fit = fit
        self._epochs = epochs
        self._schedule = schedule
        self._vocabularies = vocabularies_of(model)
        self.variables = saved_variables(model)
        self._store = Store(directory, keep)
        self._step_losses = Losses()
        self._logs: dict[str, Any] = {}
        # In this epoch, and in those from which it reads on.
        self._epoch = 0
        self._first_epoch: int | None = None
        self._num_earlier = 0
        # The state of random generators at the beginning of the epoch, before the first batch that is taken, and before
        # the first step that is trained.
        self._random_at_begin: Any = None
        self._random_at_first: Any = None
        self._random_at_step: Any = None
        # The checkpoint that this training resumes from, until it has.
        self._info: dict[str, Any] | None = None
        self._arrays: list[Array] = []
        self._restored: list[Any] = []
        self._others: CallbackStates | None = None
        self._silenced: list[keras.callbacks.Callback] = []
        self._is_complete = False
        # The last checkpoint, which may still be being written.
        self._saved: Place | None = None
        self._is_released = False
        self._folder_lock: FolderLock | None = None
        self._signals = StopSignals(fit.is_running)
        self._steps = Steps(
            model.train_function,
            model.steps_per_execution,
            self._is_active,
            self._before_reading,
            self._before_step,
            self._after_step,
        )
        try:
            self._open()
            self._signals.install()
            model.train_function = self._steps
        except BaseException:
            self.release()
            raise

    # The beginning.

    def _is_active(self) -> bool:
        return not self._is_released and self._fit.is_running()

    def _open(self) -> None:
        """Takes the folder, and restores the newest checkpoint."""
        self._folder_lock, place = open_folder(self._store, self._vocabularies, self._is_active, self.release)
        if place is not None:
            self._load(place)
        self._schedule.begin(0 if self._info is None else self._info["num_steps"])

    def _load(self, place: Place) -> None:
        """Restores a checkpoint, or raises an error before anything changes."""
        path = self._store.path_of(place)
        info, self._arrays = self._store.info(place)
        check_same_model(info, path, self.variables, self._vocabularies)
        for name in RANDOM:
            info[name] = agreement.own_or_first(info[name])
        like = [variable.value for variable in self.variables]
        self._restored = self._store.restore(place, like)
        self._store.last = self._saved = place
        self._info = info
        if place.epoch >= self._epochs or (info["is_stopped"] and self._epochs <= info["epochs"]):
            agreement.say(
                f"The training of {self._epochs} epochs in {self._store.directory} is complete: nothing is left to "
                "train. Pass more `epochs` to continue, or another `directory` to begin again."
            )
            self._is_complete = True
            _keras.start_at_epoch(self.model, max(place.epoch, self._epochs))
        else:
            step = f", after batch {place.batches}" if place.batches else ""
            agreement.say(f"Training resumes from {path}, in epoch {place.epoch + 1}{step}.")
            _keras.start_at_epoch(self.model, place.epoch)
        self._set_variables(self._restored)

    def _set_variables(self, values: list[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    def begin(self, own: list[keras.callbacks.Callback]) -> None:
        """Begins to train. Called after `on_train_begin` of all callbacks.

        Args:
            own: the callbacks that have no state of their own.
        """
        self._others = CallbackStates([each for each in self._fit.callbacks.callbacks if each not in own])
        info = self._info
        if info is None:
            return
        set_knowledge(self.model, info["knowledge"], self._arrays)
        if self._is_complete or not info["batches"]:
            self._set_variables(self._restored)
            self._others.set(info["callbacks"], self._arrays)
            set_random_state(info["random"])
        if not self._is_complete:
            self._first_epoch = info["first_epoch"]
            self._num_earlier = info["num_earlier"]
            self._read_epochs(info["epoch"] - info["first_epoch"])

    def _read_epochs(self, number: int) -> None:
        """Begins to read a `tf.data.Dataset` as often as it has been: each time changes the seed of its next order."""
        data = getattr(self._fit.data, "adapter", self._fit.data)
        dataset = data if hasattr(data, "element_spec") else _keras.dataset_of(data)
        if dataset is not None and not self._fit.reads_on:
            for _ in range(number):
                iter(dataset)

    # Epochs and steps.

    def begin_epoch(self, epoch: int, last: keras.callbacks.Callback) -> None:
        """Begins an epoch. Called after `on_epoch_begin` of all other callbacks.

        Args:
            epoch: the number of the epoch, counted from 0.
            last: the callback to call while batches are skipped.
        """
        _keras.start_at_epoch(self.model, None)
        self._epoch = epoch
        if self._first_epoch is None:
            self._first_epoch = epoch
        self._steps.begin_epoch()
        if self._info is None:
            if not self._is_reading_on:
                self._random_at_begin = random_state()
            return
        if self._info["batches"] or self._fit.reads_on:
            # The data are read again from where their order was drawn.
            self._random_at_begin = self._info["random_at_begin"]
            set_random_state(self._random_at_begin)
        else:
            self._random_at_begin = random_state()
        self._steps.skip(self._num_earlier, self._info["batches"], self._info["logs"])
        if self._info["batches"]:
            self._set_variables(self._restored)
            # What the other callbacks have seen of these batches is restored.
            self._silenced, self._fit.callbacks.callbacks = self._fit.callbacks.callbacks, [last]

    @property
    def _is_reading_on(self) -> bool:
        """Whether the data are read on from the last epoch."""
        return self._fit.reads_on and self._num_earlier > 0

    def _before_reading(self) -> None:
        # Threads of a `PyDataset` draw its order when an epoch begins; other data, when their first batch is taken.
        if self._info is None:
            if not self._is_reading_on:
                self._random_at_first = random_state()
            return
        within = self._info["batches"] > 0
        self._random_at_step = self._info["random"] if within else random_state()
        if within or self._fit.reads_on:
            set_random_state(self._info["random_at_first"])
        self._random_at_first = random_state()

    def begin_step(self) -> None:
        """Lets the other callbacks be called again, before the first step that is trained."""
        if self._silenced and not self._steps.is_skipping:
            self._fit.callbacks.callbacks, self._silenced = self._silenced, []

    def _before_step(self, state: Any) -> Any:
        if self._info is not None:
            state = self._resume(state)
        self._check_losses(state, waits=False)
        if not self._steps.batches:
            # The checkpoint of this place belongs to the end of the last epoch.
            return state
        number = self._stop_signal(is_epoch_end=False)
        is_free = processes.num_processes() > 1 or not self._store.is_busy
        if number or (self._schedule.is_due and is_free):
            self._check_losses(state, waits=True)
            self._save(Place(self._epoch, self._steps.batches), self._values_of(state))
        if number:
            self._put(state)
            self._exit(number)
        return state

    def _after_step(self, logs: Any, num_batches: int) -> None:
        self._schedule.add_steps(num_batches)
        self._logs = logs if isinstance(logs, dict) else {}
        if "loss" in self._logs:
            self._step_losses.add(Loss("loss", self._logs["loss"], self._epoch, self._steps.batches))

    def _resume(self, state: Any) -> Any:
        """Returns the state after the batches that have been skipped."""
        assert self._info is not None
        assert self._others is not None
        set_random_state(self._random_at_step)
        if self._info["batches"]:
            self._others.set(self._info["callbacks"], self._arrays)
            restored = dict(zip(map(id, self.variables), self._restored, strict=True))
            state = tuple(
                [restored.get(id(variable), value) for variable, value in zip(variables, values, strict=True)]
                for variables, values in zip(variables_of(self.model), state, strict=True)
            )
        self._info, self._arrays, self._restored = None, [], []
        return state

    def end_epoch(self, epoch: int, logs: dict[str, Any]) -> None:
        """Ends an epoch. Called after `on_epoch_end` of all other callbacks."""
        if self._info is not None:
            raise ValueError(TOO_FEW)
        state = [[variable.value for variable in group] for group in variables_of(self.model)]
        self._check_losses(state, waits=True)
        for name in ("loss", "val_loss"):
            if isinstance(logs.get(name), float) and not math.isfinite(logs[name]):
                self._raise_not_finite(Loss(name, logs[name], epoch, None))
        self._num_earlier += self._steps.batches if self._fit.reads_on else 0
        self._steps.begin_epoch()
        self._schedule.add_epoch(epoch + 1)
        number = self._stop_signal(is_epoch_end=True)
        is_last = self.model.stop_training or epoch + 1 >= self._epochs
        if number or is_last or self._schedule.is_due:
            self._save(Place(epoch + 1, 0), self._values_of(state))
        if number:
            self._exit(number)

    def end(self) -> None:
        """Ends the training. Called after `on_train_end` of all other callbacks."""
        number = self._stop_signal(is_epoch_end=True)
        if number:
            self._exit(number)
        self.release()

    def release(self) -> None:
        """Waits for the last checkpoint, and gives back all that the training holds. It may be called again."""
        if self._is_released:
            return
        self._is_released = True
        self._signals.restore()
        _keras.start_at_epoch(self.model, None)
        if self.model.train_function is self._steps:
            self.model.train_function = self._steps.function
        self._fit.callbacks.callbacks, self._silenced = self._silenced or self._fit.callbacks.callbacks, []
        self._restored, self._arrays = [], []
        self._warn(self._store.close())
        if self._folder_lock is not None:
            self._folder_lock.release()

    # Writing and stopping.

    def _values_of(self, state: Any) -> list[Any]:
        """Returns the arrays of the variables that are saved, of a state as Keras passes it to a step."""
        saved = set(map(id, self.variables))
        pairs = [
            pair
            for variables, values in zip(variables_of(self.model), state, strict=True)
            for pair in zip(variables, values, strict=True)
        ]
        return [value for variable, value in pairs if id(variable) in saved]

    def _put(self, state: Any) -> None:
        """Assigns a state to the variables, which have no values between two steps."""
        for variables, values in zip(variables_of(self.model), state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def _save(self, place: Place, values: list[Any]) -> None:
        self._schedule.note_saved()
        if place == self._saved:
            return
        assert self._others is not None
        arrays: list[Array] = []
        own = (random_state(), self._random_at_begin, self._random_at_first)
        states = map(list, zip(*processes.gather(own), strict=True))
        info = {
            "epoch": place.epoch,
            "batches": place.batches,
            "first_epoch": self._first_epoch,
            "num_earlier": self._num_earlier,
            "num_steps": self._schedule.num_steps,
            "epochs": self._epochs,
            "is_stopped": bool(self.model.stop_training),
            "logs": {name: float(value) for name, value in self._logs.items() if np.ndim(value) == 0},
            **dict(zip(RANDOM, states, strict=True)),
            "variables": described(self.variables),
            "vocabularies": {name: checksum(names) for name, names in self._vocabularies.items()},
            "knowledge": knowledge_of(self.model, arrays),
            "callbacks": self._others.to_json(arrays),
        }
        self._saved = place
        self._warn(self._store.save(place, values, info, arrays))

    def _warn(self, error: Exception | None) -> None:
        if error is not None and processes.is_first():
            warnings.warn(
                f"A checkpoint must be written as a whole. Received: {type(error).__name__}: {str(error)[:300]}. "
                f"Training continues without it. {self._last_good()} Free space in {self._store.directory}.",
                stacklevel=2,
            )

    def _last_good(self) -> str:
        last = self._store.last
        return f"{self._store.path_of(last)} is the last good checkpoint." if last else "There is no good checkpoint."

    def _stop_signal(self, is_epoch_end: bool) -> int:
        """Returns the number of the signal that stops the training, the same in all processes, or 0.

        Args:
            is_epoch_end: whether an epoch has ended.
        """
        number, is_over = self._signals.received or 0, self._schedule.is_over
        step = next(_STEP_NUMBERS)
        if processes.num_processes() > 1:
            if not is_epoch_end and step % agreement.STEPS_BETWEEN_EXCHANGES:
                number, is_over = 0, False
            else:
                number = agreement.largest(number)
                is_over = bool(agreement.of_first(is_over))
        self._schedule.note_time(is_over)
        return signal.SIGTERM if not number and agreement.is_preempted(step) else number

    def _exit(self, number: int) -> NoReturn:
        place = self._saved
        self.release()
        name = signal.Signals(number).name
        if place == self._store.last:
            agreement.say(f"{name}: training has stopped. The same command continues. {self._last_good()}")
        else:
            agreement.say(f"{name}: training has stopped, and its checkpoint could not be written. {self._last_good()}")
        raise SystemExit(128 + number)

    def _check_losses(self, state: Any, waits: bool) -> None:
        loss = self._step_losses.not_finite(waits)
        if loss is not None:
            self._put(state)
            self._raise_not_finite(loss)

    def _raise_not_finite(self, loss: Loss) -> NoReturn:
        self._warn(self._store.wait())
        where = f"{loss.name}={float(loss.value)} in epoch {loss.epoch + 1}"
        if loss.step is not None:
            where += f", after batch {loss.step}"
        raise ValueError(f"{not_finite(self.model.trainable_variables, where)} {self._last_good()}")
