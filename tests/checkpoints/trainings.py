"""Trainings that are interrupted and resumed, and what is compared at their end."""

import keras
import numpy as np

from keras_rs_contrib import TrainingCheckpoint


class Interruption(Exception):
    pass


class InterruptBefore(keras.callbacks.Callback):
    """Raises an error before a batch of an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.place = (epoch, batch)
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.place:
            raise Interruption


class WriteAtOnce(TrainingCheckpoint):
    """Waits for each checkpoint, so that none is delayed, and a test knows which there are."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        store = self._run._store
        save = store.save

        def save_and_wait(*args):
            return save(*args) or store.wait()

        store.save = save_and_wait


def end_of(model, history):
    """Returns what a training has led to, by name."""
    variables = [*model.variables, *model.optimizer.variables]
    values = {f"{number} {v.path.split('/')[-1]}": np.array(v.value) for number, v in enumerate(variables)}
    values |= {f"history {name}": np.array(each) for name, each in history.history.items()}
    values["epochs"] = np.array(history.epoch)
    data = getattr(model, "_training_data", None)
    return values if data is None else values | data.to_arrays()


def assert_equal(result, expected, **tolerance):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            np.testing.assert_allclose(result[name], value, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(result[name], value, err_msg=name)


def names_of(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("epoch"))
