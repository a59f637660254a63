"""Batches whose size divides over the devices, from any data that `fit` takes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib import _keras, columns, processes, shared_batches
from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.batch_padding import batch_length, pad, pad_for_process, padded_size

_NO_BATCH = "A dataset needs at least one batch. Received: one without any. Check what it reads and filters."


def pad_batches(
    dataset: Any, multiple: int | None = None, *, batch_size: int | None = None, shuffle: bool = False
) -> PaddedBatches:
    """Pads batches with rows of weight 0, so that each divides over the devices.

    Under a distribution, Keras on JAX rejects other batches. The result is data for `fit` and `evaluate` of any Keras
    model, which get `(x, y, sample_weight)`. Padding rows repeat the last row of their batch, so that their values are
    valid; in an empty batch they are zeros. Losses and metrics ignore them if they respect `sample_weight`: use the
    reduction `"mean_with_sample_weight"` of losses, and `weighted_metrics` of `compile`; for in-batch negatives, pass
    `sample_weight != 0` to the task as `candidate_mask`. `predict` returns predictions for padding rows too; drop those
    whose `sample_weight` is 0. `TwoTowerModel` does all this by itself. Layers that mix the rows of a batch in
    training, such as batch normalization, also see padding rows.

    Args:
        dataset: batches, as a `tf.data.Dataset`, a `keras.utils.PyDataset`, or anything else that `fit` takes; or
            arrays to be cut into batches: an array, a dict or nested structure of arrays, a DataFrame, which
            becomes a dict of its columns, or a tuple `(x, y)` or `(x, y, sample_weight)`. Each array has a row for
            each example.
        multiple: positive int that must divide the batch sizes; `None` for the number of replicas of the distribution
            in force when the batches are read.
        batch_size: number of examples in a batch, for arrays; 32 by default, as in `fit`.
        shuffle: whether to shuffle arrays, and the batches of a `PyDataset`, in each epoch.

    Returns:
        An iterable of tuples `(x, y, sample_weight)` of NumPy arrays. `y` is `None` if the data have no targets, and
        `sample_weight` is 1 if they have no weights.

    Raises:
        ValueError: if `multiple` is not a positive int, `fit` would not take the data, or, on reading, the arrays of a
            batch differ in length, or there is no batch at all.

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
    """Returns the padded batches of what `fit` takes.

    Args:
        x: as in `fit`, like all arguments that are not described here.
        y: targets.
        sample_weight: weights.
        multiple: as in `pad_batches`.
        prepare: takes the number of a batch and its `x`, `y` and `sample_weight`, and returns what is padded, or
            raises.
        batch_size: for arrays.
        steps: number of batches to read.
        shuffle: whether to shuffle.
        class_weight: weight of each class.
    """
    if isinstance(x, PaddedBatches):
        if y is not None or sample_weight is not None:
            raise ValueError(
                "Padded batches hold targets and weights. Received: `y` or `sample_weight` as well. "
                "Pass them to `pad_batches`, as `(x, y, sample_weight)`."
            )
        return PaddedBatches(x.adapter, x.multiple, prepare, x.has_weights_only, x.is_shuffled)
    x, y, sample_weight = (_without_frames(each) for each in (x, y, sample_weight))
    arrays = [array for array in keras.tree.flatten((x, y, sample_weight)) if array is not None]
    if not arrays:
        raise ValueError("A dataset needs at least one batch. Received: None. Pass arrays or a dataset.")
    are_arrays = all(hasattr(array, "shape") for array in arrays)
    if are_arrays:
        batch_length((x, y, sample_weight))
    has_weights_only = are_arrays and y is None and sample_weight is not None
    if has_weights_only:
        # Keras silently drops weights that come without targets.
        x, sample_weight = (x, sample_weight), None
    try:
        adapter = _undistributed_adapter(
            x=x,
            y=y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            steps_per_epoch=steps,
            shuffle=shuffle,
            class_weight=class_weight,
        )
    except IndexError as error:
        # Keras before 3.15 looks for the first batch of a generator that has none.
        raise ValueError(_NO_BATCH) from error
    batches = PaddedBatches(adapter, multiple, prepare, has_weights_only, bool(shuffle))
    if are_arrays and shuffle:
        again = functools.partial(_undistributed_adapter, x=x, y=y, sample_weight=sample_weight, batch_size=batch_size)
        batches.unshuffled_adapter = again
    return batches


def _undistributed_adapter(**data: Any) -> Any:
    """Returns Keras's view of data as one process reads it. Keras would split a dataset, and reject other data."""
    in_force = keras.distribution.distribution()
    if in_force is None or processes.num_processes() == 1:
        return _keras.get_data_adapter(**data)
    keras.distribution.set_distribution(None)
    try:
        return _keras.get_data_adapter(**data)
    finally:
        keras.distribution.set_distribution(in_force)


def _without_frames(data: Any) -> Any:
    """Returns data whose DataFrames are dicts of arrays, and whose Series are arrays, `[num_rows]`."""
    # Keras makes a matrix of a DataFrame, and a column of a Series.
    data = columns.as_dict(data)
    if isinstance(data, dict):
        return {name: _without_frames(values) for name, values in data.items()}
    return columns.as_array(data, "A column") if columns.is_series(data) else data


class PaddedBatches(_keras.DataAdapter):  # type: ignore[misc]
    """What `pad_batches` returns: an iterable, and data for `fit`, `evaluate` and `predict`.

    Args:
        adapter: Keras's view of the data.
        multiple: as in `pad_batches`.
        prepare: as in `padded_batches`.
        has_weights_only: whether `x` of the adapter is a pair of `x` and `sample_weight`.
        is_shuffled: whether the order of the batches depends on the random generators of NumPy and Python.

    Attributes:
        sizes: the number of rows, before and after padding, of each batch read since the last start.
        is_exhausted: whether the data are a generator that has been read.
    """

    is_exhausted = False

    def __init__(
        self,
        adapter: Any,
        multiple: int | None = None,
        prepare: Callable[[int, Any, Any, Any], tuple[Any, Any, Any]] | None = None,
        has_weights_only: bool = False,
        is_shuffled: bool = False,
    ) -> None:
        self.adapter = adapter
        self.multiple = multiple
        self.prepare = prepare
        self.has_weights_only = has_weights_only
        self.is_shuffled = is_shuffled
        self.sizes: list[tuple[int, int]] = []
        self._agreed_num_batches: tuple[int | None] | None = None
        # Raised while TensorFlow read the batches.
        self._error: Exception | None = None
        # Creates the adapter of the same batches in the order of the data, or `None` if they are in this order.
        self.unshuffled_adapter: Callable[[], Any] | None = None
        # What fills the missing columns of features whose width differs between processes, by name.
        self.column_padding: dict[str, Any] = {}
        # Builds the model in all processes, for a function that returns `x` of the first batch, or `None`.
        self.build_alike: Callable[[Callable[[], Any]], None] | None = None
        # Like `prepare`, for `unshuffled`.
        self.prepare_unchecked: Callable[[int, Any, Any, Any], tuple[Any, Any, Any]] | None = None

    def unshuffled(self) -> PaddedBatches:
        """Returns the same data in their own order, without checks."""
        adapter = self.adapter if self.unshuffled_adapter is None else self.unshuffled_adapter()
        batches = PaddedBatches(adapter, self.multiple, self.prepare_unchecked, self.has_weights_only)
        batches.is_exhausted = self.is_exhausted
        return batches

    def with_multiple(self, multiple: int | None) -> PaddedBatches:
        """Returns the same batches, padded to another multiple."""
        return PaddedBatches(self.adapter, multiple, self.prepare, self.has_weights_only, self.is_shuffled)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yields the batches of one epoch. One of several processes gets all rows that it has read."""
        self.sizes = sizes = []
        for batch in self._prepared(self._read()):
            size = batch_length(batch)
            sizes.append((size, padded_size(size, self.multiple)))
            yield pad(*batch, *sizes[-1])

    def _read(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yields the batches of one epoch as they are."""
        if self.is_exhausted:
            raise ValueError(
                "A generator can be read once. Received: an exhausted one. "
                "Pass a `tf.data.Dataset` or a `keras.utils.PyDataset`, which start again."
            )
        for batch in self.adapter.get_numpy_iterator():
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
            if self.has_weights_only:
                x, sample_weight = x
            yield x, y, sample_weight

    def _prepared(self, batches: Iterator[tuple[Any, Any, Any]]) -> Iterator[tuple[Any, Any, Any]]:
        """Yields the batches of one epoch, checked, without padding."""
        number = -1
        for number, (x, y, sample_weight) in enumerate(batches):
            if self.prepare is not None:
                x, y, sample_weight = self.prepare(number, x, y, sample_weight)
            yield x, y, sample_weight
        # Keras would start again with the few batches that it has looked at, and end after them.
        self.is_exhausted = isinstance(self.adapter, _keras.GeneratorDataAdapter)
        if number < 0 and not processes.have_own_data():
            raise ValueError(_NO_BATCH)

    def _own_rows(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yields the rows of each batch of one epoch that belong to this one of several processes."""
        self.sizes = sizes = []
        if self.is_shuffled and not processes.have_own_data():
            processes.share_random_state()
        # A generator continues in the next call of `fit`.
        max_ahead = 1 if isinstance(self.adapter, _keras.GeneratorDataAdapter) else shared_batches.MAX_AHEAD
        batches = self._read()
        if self.build_alike is not None:
            first: list[Any] = []

            def features() -> Any:
                first.extend(itertools.islice(batches, 1))
                return first[0][0] if first else None

            self.build_alike(features)
            batches = itertools.chain(first, batches)
        agreed = shared_batches.agree(self._prepared(batches), max_ahead, self.column_padding)
        for batch, size, size_of_all in agreed:
            padded, new_size = pad_for_process(batch, size, size_of_all, self.multiple)
            sizes.append((size, new_size))
            yield padded
        if not sizes:
            raise ValueError(_NO_BATCH)

    def is_padding(self, num_rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Returns which of the first `num_rows` rows of the batches read last are padding."""
        is_padding = [np.arange(new_size) >= size for size, new_size in self.sizes]
        return np.concatenate(is_padding)[:num_rows]

    def get_numpy_iterator(self) -> Iterator[tuple[Any, Any, Any]]:
        """Returns an iterator over one epoch."""
        return iter(self)

    def get_jax_iterator(self) -> Iterator[tuple[Any, Any, Any]]:
        """Returns an iterator over one epoch, whose batches Keras can distribute over devices."""
        for x, y, sample_weight in self if processes.num_processes() == 1 else self._own_rows():
            batch = keras.tree.map_structure(_with_jax_dtype, (x, y, sample_weight), none_is_leaf=False)
            yield batch[0], _keras.distributable_targets(batch[1]), batch[2]

    def get_tf_dataset(self) -> Any:
        """Returns a `tf.data.Dataset` of each epoch, for the TensorFlow backend."""
        import tensorflow as tf

        batches = iter(self)
        # Checks the first batch here, where errors keep their type.
        first: Any = _as_tuple(next(batches))

        def epoch() -> Iterator[Any]:
            nonlocal batches, first
            try:
                if first is not None:
                    yield first
                    yield from map(_as_tuple, batches)
                    batches, first = iter(()), None
                else:
                    yield from map(_as_tuple, self)
            except Exception as error:
                self._error = error
                raise

        signature = keras.tree.map_structure(
            lambda array: tf.TensorSpec((None, *array.shape[1:]), np.asarray(array).dtype), first
        )
        return tf.data.Dataset.from_generator(epoch, output_signature=signature)

    @contextlib.contextmanager
    def raising_own_errors(self) -> Iterator[None]:
        """Raises an error about a batch as it is, and not as TensorFlow reports it."""
        self._error = None
        try:
            yield
        except Exception as error:
            if self._error is None or self._error is error:
                raise
            raise self._error from None

    @property
    def num_batches(self) -> int | None:
        """The number of batches in an epoch, or `None` if it is unknown. With several processes, the largest one."""
        num_batches: int | None = self.adapter.num_batches
        if not processes.have_own_data():
            return num_batches
        if self._agreed_num_batches is None:
            numbers = processes.gather(num_batches)
            self._agreed_num_batches = (None if None in numbers else max(numbers),)
        return self._agreed_num_batches[0]

    @property
    def batch_size(self) -> int | None:
        """The number of rows in a batch before padding, or `None` if it is unknown."""
        batch_size: int | None = self.adapter.batch_size
        return batch_size

    def on_epoch_begin(self) -> None:
        """Tells the data that an epoch begins."""
        self.adapter.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Tells the data that an epoch has ended."""
        self.adapter.on_epoch_end()


def _as_tuple(batch: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Returns a batch without `None`, which a `tf.data.Dataset` cannot hold."""
    x, y, sample_weight = keras.tree.map_structure(np.asarray, batch, none_is_leaf=False)
    return x, () if y is None else y, sample_weight


def _with_jax_dtype(array: Any) -> Any:
    """Returns an array with the dtype that JAX would convert it to, and from 0.12 on warns about."""
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def is_present(sample_weight: Any) -> Any:
    """Returns which rows of a batch are present, `[batch]` bool: those whose weight is not 0."""
    return ops.not_equal(sample_weight, 0)


def split_off_validation(data: Any, validation_split: float) -> tuple[Any, Any]:
    """Returns the data without its last share, and that share, as `validation_split` of `fit` does.

    Args:
        data: nested structure of `[num_examples, ...]` arrays and `None`.
        validation_split: the share of examples to split off, in (0, 1).

    Raises:
        ValueError: if the data are not arrays, or too few to be split.
    """
    arrays = [array for array in keras.tree.flatten(data) if array is not None]
    other = next((array for array in arrays if not hasattr(array, "shape")), None)
    if other is not None:
        raise ValueError(
            "`validation_split` needs arrays, which have an end to split off. Received: "
            f"data of type {type(other).__name__}. Pass `validation_data` instead."
        )
    num_examples = batch_length(data)
    split_at = math.floor(num_examples * (1.0 - validation_split))
    if split_at in (0, num_examples):
        raise ValueError(
            "`validation_split` must leave examples on both sides. Received: "
            f"validation_split={validation_split} of {num_examples} examples. Pass more data, or another share."
        )

    def part(rows: slice) -> Any:
        return keras.tree.map_structure(lambda array: array if array is None else array[rows], data)

    return part(slice(0, split_at)), part(slice(split_at, None))


def padded_batch(prepare: Callable[[], Any], column_padding: dict[str, Any]) -> Any:
    """Returns one batch with padding, or the rows of it that one of several processes feeds.

    Args:
        prepare: returns `(x, y, sample_weight)`, or raises.
        column_padding: as in `shared_batches.agree`.
    """
    if processes.num_processes() == 1:
        x, y, sample_weight = prepare()
        size = batch_length((x, y, sample_weight))
        return pad(x, y, sample_weight, size, padded_size(size))
    only = (prepare() for _ in range(1))
    ((batch, size, size_of_all),) = shared_batches.agree(only, column_padding=column_padding)
    return pad_for_process(batch, size, size_of_all)[0]
