"""Batches that divide over the devices, whatever the data they are cut from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from keras_rs_contrib import distribution
from keras_rs_contrib.arguments import positive_int


def pad_batches(
    dataset: Any, multiple: int | None = None, *, batch_size: int | None = None, shuffle: bool = False
) -> PaddedBatches:
    """Fills batches up with rows of weight 0, so that each divides over the devices.

    Keras on JAX refuses other batches under a distribution. The result goes to `fit` and `evaluate` of any Keras model,
    which see `(x, y, sample_weight)`. Added rows repeat the last row of their batch, so that they hold what the model
    can take; those of a batch without any row are zeros. A loss or a metric leaves them out that honours
    `sample_weight`, with the reduction `"mean_with_sample_weight"` of losses, and `weighted_metrics` of `compile`; for
    in-batch negatives, `sample_weight != 0` is the task's `candidate_mask`. `predict` gives them predictions, to be
    dropped where `sample_weight` is 0. `TwoTowerModel` does all this by itself. What mixes the rows of a batch in
    training, such as batch normalization, sees the added rows.

    Args:
        dataset: batches, as a `tf.data.Dataset`, a `keras.utils.PyDataset`, or whatever else `fit` takes; or arrays to
            be cut into batches: an array, a dict or nested structure of them, or a tuple `(x, y)` or
            `(x, y, sample_weight)`. Each array has a row for each example.
        multiple: positive int by which the sizes are to divide; `None` for the number of replicas of the distribution
            that is in force when the batches are read.
        batch_size: examples a batch, of arrays; 32 by default, as in `fit`.
        shuffle: whether to shuffle arrays, and the batches of a `PyDataset`, anew for each epoch.

    Returns:
        An iterable of tuples `(x, y, sample_weight)` of NumPy arrays. `y` is `None` where the data have none,
        `sample_weight` 1 where they have none.

    Raises:
        ValueError: if `multiple` is no positive int, the data is nothing that `fit` would take, or, on reading, arrays
            of a batch differ in length, or there is no batch at all.

    Example:
    ```python
    for x, y, sample_weight in pad_batches({"user_id": np.arange(5)}, multiple=4):
        print(x["user_id"], sample_weight)  # [0 1 2 3 4 4 4 4] [1. 1. 1. 1. 1. 0. 0. 0.]
    ```
    """
    if multiple is not None:
        multiple = positive_int(multiple, "multiple")
    if isinstance(dataset, PaddedBatches):
        return dataset if multiple is None else dataset.with_multiple(multiple)
    if batch_size is not None:
        batch_size = positive_int(batch_size, "batch_size")
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(dataset)
    return padded_batches(x, y, sample_weight, multiple=multiple, batch_size=batch_size, shuffle=shuffle)


def padded_batches(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    multiple: int | None = None,
    prepare: Callable[[int, Any, Any, Any], tuple[Any, Any, Any]] | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    shuffle: bool = False,
    class_weight: dict[int, float] | None = None,
) -> PaddedBatches:
    """Returns the batches of what `fit` takes, filled up.

    Args:
        x: as of `fit`, as all that is not named here.
        y: targets.
        sample_weight: weights.
        multiple: as of `pad_batches`.
        prepare: takes the number of a batch and its `x`, `y` and `sample_weight`, and returns them as they are to be
            filled up, or raises.
        batch_size: of arrays.
        steps: batches to be read.
        shuffle: whether to shuffle.
        class_weight: weight of each class.
    """
    if isinstance(x, PaddedBatches):
        if y is not None or sample_weight is not None:
            raise ValueError(
                "Padded batches hold targets and weights. Received: `y` or `sample_weight` beside them. "
                "Pass them to `pad_batches`, as `(x, y, sample_weight)`."
            )
        return PaddedBatches(x.adapter, x.multiple, prepare, x.weighs_alone)
    arrays = [array for array in keras.tree.flatten((x, y, sample_weight)) if array is not None]
    if not arrays:
        raise ValueError("A dataset needs at least one batch. Received: None. Pass arrays or a dataset.")
    are_arrays = all(hasattr(array, "shape") for array in arrays)
    if are_arrays:
        batch_length((x, y, sample_weight))
    weighs_alone = are_arrays and y is None and sample_weight is not None
    if weighs_alone:
        # Keras drops weights without targets, in silence.
        x, sample_weight = (x, sample_weight), None
    adapter = data_adapters.get_data_adapter(
        x=x,
        y=y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps,
        shuffle=shuffle,
        class_weight=class_weight,
    )
    return PaddedBatches(adapter, multiple, prepare, weighs_alone)


class PaddedBatches(DataAdapter):  # type: ignore[misc]
    """What `pad_batches` returns: an iterable, and data for `fit`, `evaluate` and `predict`.

    Args:
        adapter: Keras's view of the data.
        multiple: as of `pad_batches`.
        prepare: as of `padded_batches`.
        weighs_alone: whether `x` of the adapter is a pair of `x` and `sample_weight`.

    Attributes:
        sizes: how many rows each batch read since the last start has, before and after padding.
    """

    _is_exhausted = False

    def __init__(
        self,
        adapter: DataAdapter,
        multiple: int | None = None,
        prepare: Callable[[int, Any, Any, Any], tuple[Any, Any, Any]] | None = None,
        weighs_alone: bool = False,
    ) -> None:
        self.adapter = adapter
        self.multiple = multiple
        self.prepare = prepare
        self.weighs_alone = weighs_alone
        self.sizes: list[tuple[int, int]] = []

    def with_multiple(self, multiple: int | None) -> PaddedBatches:
        """Returns the same batches, filled up otherwise."""
        return PaddedBatches(self.adapter, multiple, self.prepare, self.weighs_alone)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yields the batches of one epoch."""
        if self._is_exhausted:
            raise ValueError(
                "A generator can be read once. Received: one that has come to its end. "
                "Pass a `tf.data.Dataset` or a `keras.utils.PyDataset`, which begin anew."
            )
        self.sizes = sizes = []
        for number, batch in enumerate(self.adapter.get_numpy_iterator()):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
            if self.weighs_alone:
                x, sample_weight = x
            if self.prepare is not None:
                x, y, sample_weight = self.prepare(number, x, y, sample_weight)
            size = batch_length((x, y, sample_weight))
            sizes.append((size, padded_size(size, self.multiple)))
            yield pad(x, y, sample_weight, *sizes[-1])
        # Keras would begin anew with the batches that it has looked at, and with them alone.
        self._is_exhausted = isinstance(self.adapter, data_adapters.GeneratorDataAdapter)
        if not sizes:
            raise ValueError(
                "A dataset needs at least one batch. Received: one without any. Check what it reads and filters."
            )

    def is_padded(self, num_rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Returns which of the first `num_rows` rows of the batches read last have been added."""
        is_padded = [np.arange(new_size) >= size for size, new_size in self.sizes]
        return np.concatenate(is_padded)[:num_rows]

    def get_numpy_iterator(self) -> Iterator[tuple[Any, Any, Any]]:
        """Returns an iterator over one epoch."""
        return iter(self)

    def get_jax_iterator(self) -> Iterator[tuple[Any, Any, Any]]:
        """Returns an iterator over one epoch."""
        return iter(self)

    @property
    def num_batches(self) -> int | None:
        """How many batches an epoch has, or `None` where that is not known."""
        num_batches: int | None = self.adapter.num_batches
        return num_batches

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch before padding, or `None` where that is not known."""
        batch_size: int | None = self.adapter.batch_size
        return batch_size

    def on_epoch_begin(self) -> None:
        """Passes on that an epoch begins."""
        self.adapter.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Passes on that an epoch has ended."""
        self.adapter.on_epoch_end()


def padded_size(size: int, multiple: int | None = None) -> int:
    """Returns how many rows a batch of `size` has when it is filled up, at least one.

    Args:
        size: rows that there are.
        multiple: by what the number is to divide, or `None` for the replicas of the distribution in force.
    """
    multiple = multiple or distribution.num_replicas()
    return -(-max(size, 1) // multiple) * multiple


def pad(x: Any, y: Any, sample_weight: Any, size: int, new_size: int) -> tuple[Any, Any, Any]:
    """Returns a batch with rows of weight 0 after its own.

    Args:
        x: nested structure of `[size, ...]` arrays.
        y: likewise, or `None`.
        sample_weight: likewise, or `None` for 1.
        size: rows that there are.
        new_size: rows to make of them.
    """
    if sample_weight is None:
        sample_weight = np.ones(size, "float32")
    if new_size == size:
        return x, y, sample_weight
    rows = np.minimum(np.arange(new_size), size - 1)

    def repeat_last(array: Any) -> Any:
        array = np.asarray(array)
        return array[rows] if size else np.zeros((new_size, *array.shape[1:]), array.dtype)

    def add_zeros(weight: Any) -> Any:
        weight = np.asarray(weight)
        return np.concatenate([weight, np.zeros((new_size - size, *weight.shape[1:]), weight.dtype)])

    x, y = keras.tree.map_structure(repeat_last, (x, y), none_is_leaf=False)
    return x, y, keras.tree.map_structure(add_zeros, sample_weight)


def is_present(sample_weight: Any) -> Any:
    """Returns which rows of a batch are there, `[batch]` bool, for a row of weight 0 is absent."""
    return ops.not_equal(sample_weight, 0)


def batch_length(batch: Any) -> int:
    """Returns how many rows the arrays of a batch have, or raises `ValueError` where they differ."""
    arrays = [array for array in keras.tree.flatten(batch) if array is not None]
    if any(len(array.shape) == 0 for array in arrays):
        raise ValueError(
            "The arrays of a batch must have a row for each example. Received: a single number. "
            "Make batches of the dataset first: `dataset.batch(batch_size)`."
        )
    lengths = {int(array.shape[0]) for array in arrays}
    if len(lengths) != 1:
        raise ValueError(
            "The arrays of a batch must have a row for each example. Received: "
            f"arrays of lengths {sorted(lengths)}. Cut them from the same examples."
        )
    return lengths.pop()
