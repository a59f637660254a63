"""The callback that writes checkpoints of a training, and resumes it."""

from __future__ import annotations

import math
import numbers
import os
import pathlib
from typing import Any

import keras

from keras_rs_contrib.arguments import explains_keywords, positive_int
from keras_rs_contrib.checkpoints.calling_fit import calling_fit
from keras_rs_contrib.checkpoints.run import Run
from keras_rs_contrib.checkpoints.schedule import Schedule
from keras_rs_contrib.checkpoints.store import import_orbax
from keras_rs_contrib.model.added_callbacks import ReleasedCallback


class TrainingCheckpoint(ReleasedCallback):
    """Writes checkpoints during `fit`, from which the same `fit` resumes by itself.

    Start a training that was killed again, with the same command: it ends with the weights, losses and history of one
    that was not, bit by bit on the same devices, also from the middle of an epoch of shuffled data. On other devices,
    losses are equal up to rounding. It works for a `TwoTowerModel` and any other Keras model, on the JAX backend.

    A checkpoint holds the variables of the model, its optimizer and its metrics, what a `TwoTowerModel` knows of its
    training data, the place in the data, the global random generators of Python and NumPy, the history, and what
    training has changed in plain attributes of the other callbacks, such as `best` and `wait` of `EarlyStopping`. Orbax
    writes it in the background, from a copy in the memory of the host. It counts once it is complete. If writing fails,
    for instance on a full disk, a warning says so, and training continues.

    - Data: arrays, DataFrames, a `PyDataset`, or a `tf.data.Dataset` with a seed. Batches that were trained are read
      again and skipped; with `steps_per_epoch`, those of all earlier epochs. A dataset must give the same batches when
      it is created again, and pass through each epoch whole, or repeat without end.
    - SIGTERM and SIGINT: the step, or the evaluation between two epochs, is finished, a checkpoint is written, and the
      process exits with status 143 or 130 (`SystemExit`). A second signal ends it at once. A notice of preemption that
      JAX receives acts like SIGTERM.
    - A loss that is not finite raises an error that names the last good checkpoint. None is written with such a loss.
    - A complete training is not trained again. With more `epochs`, it continues.
    - A damaged checkpoint is set aside, and the one before it is used.
    - Several processes need one folder that all of them can reach.

    Exactly one of the three intervals is given; by default, `every_epochs=1`. The end of training always writes one.

    Args:
        directory: the folder of the checkpoints of one training. It is created if it does not exist.
        every_steps: positive int, the number of batches between checkpoints. One that is due while the last is still
            being written waits for it, without training waiting.
        every_epochs: positive int, the number of epochs between checkpoints.
        every_seconds: positive number, the seconds between checkpoints.
        keep: positive int, the number of newest checkpoints that remain.

    Raises:
        ImportError: if Orbax is not installed: `pip install orbax-checkpoint`.
        NotImplementedError: if the Keras backend is not JAX.
        ValueError: if an argument is out of range; in `fit`, if the newest checkpoint is of another model, with what
            differs, or the loss is not finite.
        OSError: in `fit`, before training, if no file can be written in the folder.
        RuntimeError: in `fit`, before training, if another training uses the folder.

    Example:
    ```python
    import tempfile

    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("adam", "mse")
    checkpoint = TrainingCheckpoint(tempfile.mkdtemp(), every_steps=100)
    model.fit(np.ones((8, 2)), np.ones((8, 1)), epochs=2, callbacks=[checkpoint], verbose=0)
    ```
    """

    @explains_keywords
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        every_seconds: float | None = None,
        keep: int = 3,
    ) -> None:
        super().__init__()
        if keras.backend.backend() != "jax":
            raise NotImplementedError(
                "`TrainingCheckpoint` needs the JAX backend. Received: "
                f"{keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        intervals = {"every_steps": every_steps, "every_epochs": every_epochs, "every_seconds": every_seconds}
        given = {name: value for name, value in intervals.items() if value is not None}
        if len(given) > 1:
            raise ValueError(
                "Checkpoints have one interval. Received: "
                f"{', '.join(f'{name}={value!r}' for name, value in given.items())}. Pass one of them."
            )
        self.directory = _folder(directory)
        self.every_steps = None if every_steps is None else positive_int(every_steps, "every_steps")
        self.every_epochs = None if every_epochs is None else positive_int(every_epochs, "every_epochs")
        self.every_seconds = None if every_seconds is None else _seconds(every_seconds)
        if not given:
            self.every_epochs = 1
        self.keep = positive_int(keep, "keep")
        import_orbax()
        self._run: Run | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Resumes from the newest checkpoint, if there is one."""
        self.release()
        fit = calling_fit()
        if any(isinstance(each, TrainingCheckpoint) and each is not self for each in fit.callbacks.callbacks):
            raise ValueError(
                "A training has one `TrainingCheckpoint`. Received: several. Pass one, with a larger `keep` if needed."
            )
        schedule = Schedule(self.every_steps, self.every_epochs, self.every_seconds)
        self._run = Run(self.model, fit, self.params["epochs"], self.directory, schedule, self.keep)
        # Keras calls callbacks in the order of this list. Those of Keras itself come after those of a user.
        last = _Last(self._run, self)
        last.set_params(self.params)
        last.set_model(self.model)
        fit.callbacks.callbacks.append(last)

    def release(self) -> None:
        """Waits for the last checkpoint, and lets go of the folder, the signals and the step."""
        run, self._run = self._run, None
        if run is not None:
            run.release()


class _Last(keras.callbacks.Callback):  # type: ignore[misc]
    """Tells a run when all other callbacks have been called."""

    def __init__(self, run: Run, owner: TrainingCheckpoint) -> None:
        super().__init__()
        self._run = run
        self._owner = owner

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._run.begin([self, self._owner])

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._run.begin_epoch(epoch, self)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._run.begin_step()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._run.end_epoch(epoch, logs or {})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._run.end()
        self._owner.release()


def _folder(directory: Any) -> pathlib.Path:
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
        raise ValueError(
            f"`directory` must be the path of a folder. Received: directory={directory!r}. Pass a string or a `Path`."
        )
    if "://" in str(directory):
        raise ValueError(
            "`directory` must be a folder of a file system, where it can be locked. Received: "
            f"directory={str(directory)!r}. Mount the storage, and pass the path of the folder."
        )
    return pathlib.Path(directory).expanduser().absolute()


def _seconds(value: Any) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < float(value) < math.inf:
        raise ValueError(
            f"`every_seconds` must be a positive number. Received: every_seconds={value!r}. Pass 600, for instance."
        )
    return float(value)
