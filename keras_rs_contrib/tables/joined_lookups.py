"""Functions that look up a row-sparse table several times, run with a single lookup."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_rs_contrib.tables.lookup_together import lookup_together
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding


def with_joined_lookups(
    tables: Sequence[RowSparseEmbedding], variables: Iterable[keras.Variable], function: Callable[[], Any]
) -> Any:
    """Returns the result of a function, whose lookups in each table are joined into one.

    The gradient of a `RowSparseEmbedding` is the table after the step, and two such gradients cannot be added. The
    function runs twice: first to learn which ids it looks up, and then with parts of the joined lookup. What the first
    run computes from embeddings is not used, and is left out of the compiled step.

    Args:
        tables: the tables.
        variables: the other variables that the function uses. The first run does not change them.
        function: has no arguments. The ids that it looks up do not depend on embeddings of the tables.
    """
    ids: dict[int, list[Any]] = {id(table): [] for table in tables}

    def recording(table: RowSparseEmbedding) -> Callable[[Any], Any]:
        def record(inputs: Any) -> Any:
            ids[id(table)].append(inputs)
            return ops.zeros((*inputs.shape, table.output_dim), table.compute_dtype)

        return record

    def replaying(parts: list[Any]) -> Callable[[Any], Any]:
        remaining = iter(parts)
        return lambda inputs: next(remaining)

    mapping = [(variable, variable.value) for variable in variables]
    with (
        keras.StatelessScope(state_mapping=mapping),
        _answering({id(table): recording(table) for table in tables}, tables),
    ):
        function()
    # One lookup of a table needs no joining.
    answers: dict[int, Callable[[Any], Any]] = {}
    for table in tables:
        if len(ids[id(table)]) > 1:
            answers[id(table)] = replaying(lookup_together(table, ids[id(table)]))
    with _answering(answers, tables):
        return function()


@contextlib.contextmanager
def _answering(answers: dict[int, Callable[[Any], Any]], tables: Sequence[RowSparseEmbedding]) -> Iterator[None]:
    """Lets tables answer their calls by functions, within `with`."""
    for table in tables:
        # Hidden from Keras's attribute tracking.
        object.__setattr__(table, "answer", answers.get(id(table)))
    try:
        yield
    finally:
        for table in tables:
            object.__setattr__(table, "answer", None)
