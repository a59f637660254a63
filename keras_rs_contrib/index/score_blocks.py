"""The scores of some queries with all rows of a table: pure functions of arrays."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp

from keras_rs_contrib.scores import comparable_candidates, comparable_queries, inverse_norm, is_bias
from keras_rs_contrib.tables.layout import TableLayout

# Scores in a block: 256 MiB.
BLOCK_SIZE = 2**26
# Queries in a block: enough for a matrix product at full speed, and 64 columns of scores fill whole vectors.
QUERIES_IN_BLOCK = 64
# Blocks of a small corpus have more queries: this many scores stay in the cache.
CACHED_SCORES = 2**19
# Rows that the product with a single query processes at once: XLA's 8, doubled for safety.
KERNEL_ROWS = 16
# XLA on a CPU compiles the product `query @ table.T` of a single query to a loop over the rows, split over the cores.
# Up to JAX 0.11.0 it vectorizes the sum over the dimensions, unless there are few of them, which it unrolls.
VECTORIZES_LOOP = jax.__version_info__ < (0, 11, 1)
MIN_VECTORIZED_DIMENSION = 64
# With fewer rows, the loop is no faster than the kernel.
MIN_LOOP_ROWS = 2**16
# Larger buffers than 32 MiB cost a page fault for each page at each call.
MAX_CHEAP_BUFFER = 2**23
# A cosine changes no larger number in float32.
MAX_COUNTED_BIAS = 1e18
# Stands for a score of -inf or NaN wherever scores are ordered; -inf then stands for no candidate.
LOWEST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class Search:
    """How a table is searched; static, so that a function compiles once for each.

    Attributes:
        num_candidates: rows of the table that are candidates, the first ones; the others are padding.
        similarity: that of the task and the index.
        block_size: the number of scores that a device computes at once.
        recall_target: the expected share of the exact top-k to find on a TPU, in (0, 1]; `None`, and any other device,
            finds all.
        layout: the layout of the table on a mesh, or `None` on a single device.
    """

    num_candidates: int
    similarity: str = "dot"
    block_size: int = BLOCK_SIZE
    recall_target: float | None = None
    layout: TableLayout | None = None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function on JAX. In eager mode, each operation would write a new copy of the scores."""
    names = ("k", "search")
    static = [name for name in names if name in inspect.signature(function).parameters]
    return jax.jit(function, static_argnames=static) if keras.backend.backend() == "jax" else function


def check_recall_target(recall_target: Any) -> None:
    """Raises `ValueError` if `recall_target` is neither `None` nor a number in (0, 1]."""
    if recall_target is None:
        return
    if (
        not isinstance(recall_target, numbers.Real)
        or isinstance(recall_target, bool)
        or not 0 < float(recall_target) <= 1
    ):
        raise ValueError(
            "`recall_target` must be a share in (0, 1]. Received: "
            f"recall_target={recall_target!r}. Pass 0.95, for instance, or None for the exact top-k."
        )


def platform_of(search: Search) -> str:
    """Returns the platform of the devices that run a search."""
    if search.layout is None:
        return str(jax.default_backend())
    return str(search.layout.mesh.devices.flat[0].platform)


def to_keys(scores: Any, numpy: Any = jnp) -> Any:
    """Returns keys that order scores: -inf and NaN become `LOWEST`, and -0.0 becomes 0.0.

    XLA's top-k orders -0.0 below 0.0, although they are equal.
    """
    keys = numpy.where(scores > LOWEST, scores, LOWEST)
    return numpy.where(keys == 0.0, 0.0, keys)


def score_block(queries: Any, table: Any, search: Search) -> Any:
    """Returns the `[num_rows, num_queries]` float32 scores of some queries.

    Rows come first, so that the reductions over rows that follow run along whole vectors of queries.
    """
    queries = comparable_queries(queries, search.similarity)

    is_single = queries.shape[0] == 1
    if is_single and platform_of(search) == "cpu" and (_in_loop(table) or table.size > MAX_CHEAP_BUFFER):
        return _scores_without_copy(table, queries, search.similarity)
    multiply = _kernel if is_single else _multiply

    def product(rows: Any) -> Any:
        return multiply(comparable_candidates(rows, search.similarity), queries)

    num_rows, dimension = table.shape
    num_converted = max(1, search.block_size // dimension)
    if (table.dtype == jnp.float32 and search.similarity == "dot") or num_rows <= num_converted:
        return product(table)

    # Converting the whole table at once would exceed the block. (XLA on CPU converts a bfloat16 table whole anyway.)
    def convert_and_score(i: Any, result: Any) -> Any:
        # The last part overlaps the one before, and writes the same scores.
        start = jnp.minimum(i * num_converted, num_rows - num_converted)
        part = product(lax.dynamic_slice_in_dim(table, start, num_converted))
        return lax.dynamic_update_slice_in_dim(result, part, start, axis=0)

    empty = jnp.zeros((num_rows, queries.shape[0]), jnp.float32)
    return lax.fori_loop(0, -(-num_rows // num_converted), convert_and_score, empty)


def without_padding(scores: Any, num_candidates: Any, num_padding_rows: int) -> Any:
    """Returns scores with -inf in the padding rows, which then rank after every candidate.

    Args:
        scores: `[num_rows, num_queries]` float32.
        num_candidates: the number of rows that are candidates, the first ones; may be traced, and exceed `num_rows`.
        num_padding_rows: the largest number of padding rows.
    """
    num_rows, num_queries = scores.shape
    size = min(num_padding_rows, num_rows)
    if not size:
        return scores
    # In place: masking all scores would be another pass over them.
    start = num_rows - size
    rows = start + lax.broadcasted_iota(jnp.int32, (size, num_queries), 0)
    last = jnp.where(rows < num_candidates, scores[start:], -jnp.inf)
    return lax.dynamic_update_slice_in_dim(scores, last, start, axis=0)


def in_blocks(function: Callable[..., Any], num_rows: int, search: Search, *arrays: Any) -> Any:
    """Returns the result of `function` for all queries, called with one block of queries at a time.

    Args:
        function: takes some rows of each of the arrays, or `None` for one that is `None`; returns arrays with a row for
            each query.
        num_rows: the number of scores of a query.
        search: names the size of a block.
        *arrays: `[num_queries, ...]`, or `None`.
    """
    num_queries = arrays[0].shape[0]
    most = max(1, min(max(QUERIES_IN_BLOCK, CACHED_SCORES // num_rows), search.block_size // num_rows))
    num_blocks = max(1, -(-num_queries // most))
    if num_blocks == 1:
        return function(*arrays)
    # Blocks of equal size need the least padding.
    size = -(-num_queries // num_blocks)

    def to_blocks(array: Any) -> Any:
        padding = ((0, num_blocks * size - num_queries), *[(0, 0)] * (array.ndim - 1))
        return jnp.pad(array, padding).reshape(num_blocks, size, *array.shape[1:])

    result = lax.map(lambda block: function(*block), jax.tree.map(to_blocks, arrays))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:num_queries], result)


def _in_loop(table: Any) -> bool:
    """Returns whether the loop of a CPU is faster than its kernel for a single query."""
    if table.dtype != jnp.float32 and table.size > MAX_CHEAP_BUFFER:
        # The loop converts row by row.
        return True
    num_rows, dimension = table.shape
    return bool(VECTORIZES_LOOP and dimension >= MIN_VECTORIZED_DIMENSION and num_rows >= MIN_LOOP_ROWS)


def _scores_without_copy(table: Any, query: Any, similarity: str) -> Any:
    """Returns the `[num_rows, 1]` float32 scores of a single query, without a converted or normalized table in memory.

    Args:
        table: `[num_rows, embedding_dim]` float.
        query: `[1, embedding_dim]` float32, comparable.
        similarity: that of the task and the index.
    """
    in_loop = _in_loop(table)
    product = _loop if in_loop else _kernel
    rows = table.astype(jnp.float32)
    if similarity == "dot":
        return product(rows, query)
    counted = jnp.ones_like(query)
    if similarity == "biased_cosine":
        counted = jnp.where(is_bias(query.shape[1]), 0.0, counted)
    squares = jnp.square(rows)
    # XLA multiplies and adds up without a copy, but not if the bias is masked by `where`.
    squared_norms = _loop(squares, counted) if in_loop else jnp.sum(squares * counted, axis=1, keepdims=True)
    scores = product(rows, query * counted) * inverse_norm(squared_norms)
    if similarity == "cosine":
        return scores
    bias = rows[:, -1:]
    # The square of a larger bias overflows, and an infinite one times 0 is NaN. Next to it, a cosine is nothing.
    return jnp.where(jnp.abs(bias) > MAX_COUNTED_BIAS, bias, scores + bias)


def _multiply(rows: Any, queries: Any) -> Any:
    # The default precision of an accelerator may be lower than float32.
    return lax.dot_general(rows, queries, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _loop(rows: Any, query: Any) -> Any:
    """Returns the inner products with one query, from the loop of a CPU, which sums all rows in the same order."""
    return jnp.matmul(query, rows.T, precision=lax.Precision.HIGHEST).T


def _kernel(rows: Any, query: Any) -> Any:
    """Returns the inner products with one query, from the kernel of a CPU, which uses a single core."""
    num_rows = rows.shape[0]
    left = num_rows % KERNEL_ROWS
    if not left:
        return _multiply(rows, query)
    # The last rows, which do not fill the kernel, are rounded differently from all others. In a block that fills the
    # kernel, they are rounded alike.
    if num_rows < KERNEL_ROWS:
        return _multiply(jnp.pad(rows, ((0, KERNEL_ROWS - left), (0, 0))), query)[:num_rows]
    start = num_rows - KERNEL_ROWS
    # XLA of JAX 0.8 would fuse the slice with its product into a loop, which rounds unlike the kernel. It does
    # not fuse across a branch. The scores of a query with NaN do not matter.
    last = lax.cond(
        jnp.isnan(query).any(),
        lambda last: jnp.full((KERNEL_ROWS, 1), jnp.nan, jnp.float32),
        lambda last: _multiply(last, query),
        rows[start:],
    )
    return lax.dynamic_update_slice_in_dim(_multiply(rows, query), last, start, axis=0)
