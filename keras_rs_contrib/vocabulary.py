"""Vocabularies: names, which are strings or integers, as rows of a table."""

from __future__ import annotations

import gzip
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Hashable
from typing import Any

import keras
import numpy as np

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.names import (
    NO_ROW,
    are_padding,
    as_arrow,
    as_name,
    check_different,
    check_names,
    flat_names,
    padded_names,
)

UNKNOWN_ROW = 0
# Up to this many names are in the config of a saved model. More are in a file of their own.
MAX_NAMES_IN_CONFIG = 1_000
# Integers are looked up in a table if it has at most this many elements for each name.
MAX_GAPS = 16
_FILE = "names.json.gz"


class _NotHashableError(TypeError):
    """Names are lists, or something else that a dict cannot look up."""


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class Vocabulary(keras.layers.Layer):  # type: ignore[misc]
    """Maps names to the rows of a table, and back. Row 0 stands for all unknown names.

    Names are strings, or integers of any size. Bytes, as TensorFlow's strings are, count as UTF-8. Nothing here needs
    TensorFlow: `encode` and `decode` work on NumPy arrays, in the input pipeline, and not within compiled functions.

    A vocabulary is a layer without weights, so that a model with a vocabulary as an attribute saves and loads it. In a
    `.keras` file, more than 1,000 names are an asset, compressed. A file of weights does not contain them.

    Example:
    ```python
    movies = Vocabulary.from_data(["Alien", "Heat", "Heat", "Up"])
    rows = movies.encode(["Heat", "Solaris"])  # 1, and 0 for an unknown name
    names = movies.decode([1, 2])  # "Heat" and "Alien"
    table = keras.layers.Embedding(len(movies), 16)
    ```

    Args:
        names: the names of the rows 1, 2, ..., as a list, a Series or an array, without duplicates.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if a name is neither a string nor an integer, or if there are both.
        ValueError: if a name is missing, empty or a duplicate.
    """

    def __init__(self, names: Any, **kwargs: Any) -> None:
        names = flat_names(names)[0]
        check_different(names)
        super().__init__(**kwargs)
        self._set_names(names)
        self.built = True

    @classmethod
    def from_data(cls, values: Any, *, min_count: int = 1, max_size: int | None = None, **kwargs: Any) -> Vocabulary:
        """Returns the vocabulary of the values in a column, the most frequent first, and equal counts by first row.

        Args:
            values: a list, a Series or an array of names, of any shape.
            min_count: positive int. Names with fewer rows are left out.
            max_size: positive int, the largest number of names. `None` for no limit.
            **kwargs: arguments of `keras.layers.Layer`.

        Raises:
            TypeError: if a value is neither a string nor an integer, or if there are both.
            ValueError: if a value is missing or empty.
        """
        min_count = positive_int(min_count, "min_count")
        max_size = None if max_size is None else positive_int(max_size, "max_size")
        flat, _ = flat_names(values)
        check_names(flat)
        counts = Counter(flat).most_common(max_size)
        return cls([name for name, count in counts if count >= min_count], **kwargs)

    def __len__(self) -> int:
        """The number of rows that a table needs: that of the names, and one for unknown names."""
        return self._num_names + 1

    def __bool__(self) -> bool:
        return True

    def __contains__(self, name: Any) -> bool:
        return as_name(name) in self._known_rows()

    @property
    def names(self) -> list[Any]:
        """The names of the rows 1, 2, ..., as a list of strings or integers."""
        self._known_rows()
        return list(self._names[1:])

    def encode(self, names: Any, *, unknown: str = "row", padded: bool = False) -> np.ndarray[Any, Any]:
        """Returns the rows of names.

        Args:
            names: a name, or a list, a Series or an array of names, of any shape. With `padded`, also a list or a
                Series of lists or sets of different lengths.
            unknown: `"row"`, for which names that are not in the vocabulary get row 0, or `"error"`.
            padded: whether `None`, NaN, `""` and, among integers, -1 are padding, whose row is -1. Short rows of lists
                are padded on the left, so that the last name of each is in the last column.

        Returns:
            int32, shape of `names`, or `[num_rows, m]` for rows of up to m names.

        Raises:
            TypeError: if a name is neither a string nor an integer, or if the vocabulary has names of the other kind.
            ValueError: if a name is missing, or unknown with `unknown="error"`.
        """
        if unknown not in ("row", "error"):
            raise ValueError(f"`unknown` must be 'row' or 'error'. Received: {unknown!r}. Pass one of them.")
        if padded:
            return self._encode_padded(names, unknown)
        self._known_rows()
        integers = self._encode_integers(names)
        if integers is not None and (unknown == "row" or integers.all()):
            return integers
        for encode in (self._encode_arrow, self._encode_strings):
            strings = encode(names, unknown)
            if strings is not None:
                return strings
        flat, shape = flat_names(names)
        if not isinstance(self._names[1], str):
            # In a dict, 1.0 and True are equal to 1.
            check_names(flat)
        return self._rows_of(flat, unknown).reshape(shape)

    def decode(self, rows: Any) -> np.ndarray[Any, Any]:
        """Returns the names of rows.

        Args:
            rows: ints, of any shape. -1 stands for no row, as in lists of fewer than k candidates.

        Returns:
            An object array, shape of `rows`, of strings or integers, with `None` for the rows 0 and -1.

        Raises:
            TypeError: if the rows are not integers.
            ValueError: if the vocabulary has no such row.
        """
        self._known_rows()
        rows = np.asarray(rows)
        if not np.issubdtype(rows.dtype, np.integer) and rows.size:
            raise TypeError(f"Rows must be integers. Received: dtype {rows.dtype}. Pass what `encode` returns.")
        rows = rows.astype("int64")
        if rows.size and (rows.min() < -1 or rows.max() >= len(self)):
            wrong = rows.max() if rows.max() >= len(self) else rows.min()
            raise ValueError(
                f"A row must be in [-1, {len(self) - 1}]. Received: {wrong}. Create the table with "
                f"`len(vocabulary)` = {len(self)} rows."
            )
        result: np.ndarray[Any, Any] = self._names[np.maximum(rows, UNKNOWN_ROW)]
        return result

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `TypeError`: names are not tensors."""
        raise TypeError(
            "A `Vocabulary` works on arrays, not within a model. Received: a call. Use `encode` in the input "
            "pipeline, and pass the rows to the model."
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor. While Keras writes a file, without a large number of names."""
        config: dict[str, Any] = super().get_config()
        if self._is_large() and _keras.is_saving():
            config["num_names"] = self._num_names
        else:
            config["names"] = self.names
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Vocabulary:
        """Returns the vocabulary that `get_config` describes. Keras loads a large number of names afterwards."""
        if "num_names" not in config:
            return cls(**config)
        config = dict(config)
        num_names = config.pop("num_names")
        vocabulary = cls(names=["to be loaded"], **config)
        vocabulary._set_names([])
        vocabulary._num_names = num_names
        return vocabulary

    def save_assets(self, dir_path: str) -> None:
        """Writes a large number of names to a file in a folder."""
        if self._is_large():
            text = json.dumps(self.names, ensure_ascii=False, separators=(",", ":"))
            with gzip.open(pathlib.Path(dir_path) / _FILE, "wb", compresslevel=3) as file:
                file.write(text.encode("utf-8", "surrogatepass"))

    def load_assets(self, dir_path: str) -> None:
        """Reads what `save_assets` has written."""
        if self._is_large():
            with gzip.open(pathlib.Path(dir_path) / _FILE, "rb") as file:
                self._set_names(json.loads(file.read().decode("utf-8", "surrogatepass")))

    def _is_large(self) -> bool:
        return self._num_names > MAX_NAMES_IN_CONFIG

    def _set_names(self, names: list[Any]) -> None:
        # Hidden from Keras's attribute tracking, which would wrap them.
        array = np.empty(len(names) + 1, object)
        array[0] = None
        array[1:] = names
        object.__setattr__(self, "_names", array)
        object.__setattr__(self, "_rows", dict(zip(names, range(1, len(names) + 1), strict=True)))
        object.__setattr__(self, "_row_table", _row_table(names))
        object.__setattr__(self, "_arrow_names", None)
        self._num_names = len(names)

    def _known_rows(self) -> dict[Any, int]:
        rows: dict[Any, int] = self._rows
        if len(rows) != self._num_names:
            raise ValueError(
                f"The names of a vocabulary must be loaded before it is used. Received: {self.name!r}, whose "
                f"{self._num_names} names are in the `.keras` file that it was saved in. Load that file."
            )
        return rows

    def _encode_integers(self, names: Any) -> np.ndarray[Any, Any] | None:
        """Returns the rows of an array of integers if a table from integers to rows would be small, or `None`."""
        if not isinstance(names, np.ndarray) or names.dtype.kind not in "iu" or self._row_table is None:
            return None
        if names.dtype == "uint64" and names.size and names.max() > np.iinfo("int64").max:
            return None
        least, table = self._row_table
        integers = names.astype("int64")
        inside = (integers >= least) & (integers < least + len(table))
        result: np.ndarray[Any, Any] = np.where(inside, table[np.where(inside, integers - least, 0)], 0)
        return result

    def _encode_arrow(self, names: Any, unknown: str) -> np.ndarray[Any, Any] | None:
        """Returns the rows of a Series of Arrow's strings, or `None` for other names.

        Arrow finds its own strings. A conversion to Python's strings takes longer than finding them.
        """
        column = as_arrow(names) if isinstance(self._names[1], str) else None
        if column is None:
            return None
        from pyarrow import array, compute

        if self._arrow_names is None or self._arrow_names.type != column.type:
            try:
                object.__setattr__(self, "_arrow_names", array(self._names[1:], column.type))
            except UnicodeEncodeError:
                # Names that Arrow cannot hold.
                return None
        places = compute.index_in(column, value_set=self._arrow_names)
        rows = np.asarray(compute.add(compute.fill_null(places, NO_ROW), 1), "int32")
        is_unknown = rows == UNKNOWN_ROW
        if is_unknown.any():
            self._check_unknown(names[is_unknown].tolist(), unknown)
        return rows

    def _encode_strings(self, names: Any, unknown: str) -> np.ndarray[Any, Any] | None:
        """Returns the rows of an array or a list of strings, or `None` if it may be something else."""
        is_array = isinstance(names, np.ndarray) and names.dtype.kind == "O"
        if not isinstance(self._names[1], str) or not (is_array or isinstance(names, list)):
            return None
        try:
            rows = self._rows_of(names.ravel().tolist() if is_array else names, unknown)
        except _NotHashableError:
            return None
        return rows.reshape(names.shape) if is_array else rows

    def _rows_of(self, names: list[Any], unknown: str) -> np.ndarray[Any, Any]:
        """Returns the rows of a flat list of names. The slow conversions and checks are for those not found."""
        find = self._known_rows().get
        try:
            rows = np.fromiter(map(find, names, itertools.repeat(UNKNOWN_ROW)), "int32", len(names))
        except TypeError as error:
            wrong = next(name for name in names if not isinstance(name, Hashable))
            raise _NotHashableError(
                f"A name must be a string or an integer. Received: {wrong!r}. Pass a flat column of names, or rows of "
                "names with padded=True."
            ) from error
        places = np.flatnonzero(rows == UNKNOWN_ROW)
        if places.size:
            others = [as_name(names[place]) for place in places]
            rows[places] = [find(name, UNKNOWN_ROW) for name in others]
            others = [name for name, row in zip(others, rows[places], strict=True) if row == UNKNOWN_ROW]
            if others:
                self._check_unknown(others, unknown)
        return rows

    def _encode_padded(self, names: Any, unknown: str) -> np.ndarray[Any, Any]:
        """Returns the rows of names with padding."""
        self._known_rows()
        array = names if isinstance(names, np.ndarray) and names.dtype.kind in "iu" else padded_names(names)
        is_padding = are_padding(array, isinstance(self._names[1], str))
        result = np.full(array.shape, NO_ROW, "int32")
        result[~is_padding] = self.encode(array[~is_padding], unknown=unknown)
        return result

    def _check_unknown(self, names: list[Any], unknown: str) -> None:
        """Raises an error for names that are not in the vocabulary, if they cannot be names, or must be known."""
        check_names(names)
        kinds = {type(name) for name in (names[0], *self._names[1:2])}
        if len(kinds) > 1:
            raise TypeError(
                f"A name must be of the kind of the vocabulary's names. Received: {names[0]!r}, and "
                f"{self._names[1]!r} in {self.name!r}. Convert the column, for instance with `.astype(str)`."
            )
        if unknown == "error":
            raise ValueError(
                f"A name must be in the vocabulary. Received: {names[0]!r}, which {self.name!r} does not have, with "
                f"{len(set(names))} such names in all. Leave them out, or pass unknown='row'."
            )


def _row_table(names: list[Any]) -> tuple[int, np.ndarray[Any, Any]] | None:
    """Returns the least of integers and the rows of all integers up to the largest, or `None` for strings or gaps."""
    if not names or not isinstance(names[0], int):
        return None
    least, largest = min(names), max(names)
    if least < -(2**62) or largest > 2**62 or largest - least > MAX_GAPS * len(names):
        return None
    table = np.full(largest - least + 1, UNKNOWN_ROW, "int32")
    table[np.array(names, "int64") - least] = np.arange(1, len(names) + 1)
    return least, table
