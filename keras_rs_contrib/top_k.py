"""Exact top-k of the rows of a table, whole or split over devices: pure functions of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import keras
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from keras import ops

from keras_rs_contrib import losses
from keras_rs_contrib.distribution import TableLayout


def scores(query_embeddings: Any, table: Any, similarity: str) -> Any:
    """Returns the score of every query with every row of the table.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float.
        table: `[num_rows, embedding_dim]` float.
        similarity: `"dot"` or `"cosine"`.

    Returns:
        `[num_queries, num_rows]` float32, without negative zeros: top-k puts them below zero, and they are equal.
    """
    queries = losses.to_comparable(query_embeddings, similarity)
    rows = ops.cast(table, "float32")
    result = ops.matmul(queries, ops.transpose(rows))
    if similarity == "cosine":
        # The rows' lengths divide the scores, so that no normalised copy of the table is made.
        squared_norms = ops.sum(ops.square(rows), axis=1)
        result = ops.multiply(result, ops.expand_dims(ops.rsqrt(ops.maximum(squared_norms, 1e-12)), 0))
    return ops.where(ops.equal(result, 0.0), 0.0, result)


def _compiled(function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Returns the function compiled, on JAX: called eagerly, each of its steps would write the scores anew."""
    if keras.backend.backend() != "jax":
        return function
    return jax.jit(function, static_argnames=("k", "similarity"))


@_compiled
def top_k(query_embeddings: Any, table: Any, k: int, similarity: str = "dot", excluded: Any = None) -> tuple[Any, Any]:
    """Returns the k rows of the table that score highest for each query, best first.

    Equal scores rank by lower row first.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float.
        table: `[num_rows, embedding_dim]` float, `num_rows >= k`.
        k: how many rows.
        similarity: `"dot"` or `"cosine"`.
        excluded: `[num_rows]` bool; True scores -inf. `None` excludes nothing.

    Returns:
        Scores `[num_queries, k]` float32 and rows `[num_queries, k]` int32.
    """
    all_scores = scores(query_embeddings, table, similarity)
    if excluded is not None:
        all_scores = ops.where(ops.expand_dims(excluded, 0), float("-inf"), all_scores)
    top_scores, rows = ops.top_k(all_scores, k)
    return top_scores, ops.cast(rows, "int32")


@functools.partial(jax.jit, static_argnames=("k", "layout", "similarity"))
def distributed_top_k(
    query_embeddings: Any, table: Any, k: int, layout: TableLayout, similarity: str = "dot", excluded: Any = None
) -> tuple[Any, Any]:
    """Returns what `top_k` does, of a table on a mesh, each device scoring its own queries with its own rows.

    A table that every device holds needs no traffic. Of one whose rows are split, k pairs a query and shard travel:
    neither scores nor rows of the table. Where one mesh axis splits both, the queries travel too.

    Args:
        query_embeddings: `[num_queries, embedding_dim]` float, split over the batch axis or not.
        table: `[num_rows, embedding_dim]` float, laid out as `layout` says.
        k: how many rows.
        layout: how the table lies on the devices.
        similarity: `"dot"` or `"cosine"`.
        excluded: `[num_rows]` bool; True scores -inf. `None` excludes nothing.

    Returns:
        Scores `[num_queries, k]` float32 and rows `[num_queries, k]` int32.
    """
    num_queries = query_embeddings.shape[0]
    # Keras feeds batches that divide; a layer called on its own may see others.
    padding = -num_queries % layout.num_batch_shards
    queries = jax.numpy.pad(query_embeddings, ((0, padding), (0, 0))) if padding else query_embeddings
    split_queries = PartitionSpec(layout.batch_axis, None)
    split_rows = PartitionSpec(layout.row_axis, None)

    def top_k_of_shard(queries: Any, rows: Any, excluded: Any) -> tuple[Any, Any]:
        gathers_queries = layout.row_axis == layout.batch_axis
        if gathers_queries:
            queries = lax.all_gather(queries, layout.batch_axis, axis=0, tiled=True)
        # Each shard keeps up to k rows: all k winners may lie on one shard.
        shard_scores, shard_rows = top_k(queries, rows, min(k, rows.shape[0]), similarity, excluded)
        if layout.row_axis is None:
            return shard_scores, shard_rows
        shard_rows = shard_rows + lax.axis_index(layout.row_axis) * rows.shape[0]
        if gathers_queries:
            exchange = functools.partial(
                lax.all_to_all, axis_name=layout.row_axis, split_axis=0, concat_axis=1, tiled=True
            )
        else:
            exchange = functools.partial(lax.all_gather, axis_name=layout.row_axis, axis=1, tiled=True)
        # In the order of the shards, and so in that of the rows: equal scores keep their order through the merge.
        shard_scores, shard_rows = exchange(shard_scores), exchange(shard_rows)
        merged_scores, places = lax.top_k(shard_scores, k)
        return merged_scores, jax.numpy.take_along_axis(shard_rows, places, axis=1)

    top_scores, rows = jax.shard_map(
        top_k_of_shard,
        mesh=layout.mesh,
        in_specs=(split_queries, split_rows, PartitionSpec(layout.row_axis)),
        out_specs=(split_queries, split_queries),
        # After the gather all shards of the row axis hold the same pairs, which JAX cannot see.
        check_vma=False,
    )(queries, table, excluded)
    return top_scores[:num_queries], rows[:num_queries]


def on_mesh(array: Any, layout: TableLayout) -> Any:
    """Returns `array` on the devices of the mesh, for it may lie on one that is not of it, or on one alone.

    Args:
        array: array of any shape, concrete or traced.
        layout: the mesh.
    """
    if isinstance(array, jax.core.Tracer):
        return array
    return jax.device_put(array, NamedSharding(layout.mesh, PartitionSpec()))
