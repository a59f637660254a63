"""`shard_candidates`, which ties a retrieval layer to the tower that embeds the candidates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import keras_rs

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import explains_keywords
from keras_rs_contrib.index.candidate_store import is_table
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.tables.layout import axis_of_rows, check_mesh_axis, check_rows_divide
from keras_rs_contrib.tables.sharded_embedding import ShardedEmbedding
from keras_rs_contrib.vocabulary import Vocabulary


@explains_keywords
def shard_candidates(
    retrieval: keras_rs.layers.BruteForceRetrieval,
    candidate_tower: keras.layers.Layer,
    *,
    candidates: Any = None,
    candidate_ids: Any = None,
    vocabularies: dict[str, Vocabulary] | None = None,
    exclude_ids: Iterable[int] = (),
    similarity: str = "dot",
    mesh_axis: str | None = None,
    block_size: int | None = None,
    recall_target: float | None = None,
) -> ShardedBruteForceRetrieval:
    """Ties a retrieval layer to the tower that embeds the candidates.

    The index of an embedding tower is the tower's own variable: there is no copy, a prediction uses the weights of the
    last training step, and the table is saved once. The index of any other tower is a weight that holds the tower's
    output for `candidates`; `refresh()` computes it again after training. `TwoTowerModel` does so by itself. In a model
    of your own, pass `RefreshCandidates(index)` to `fit`: `evaluate` and `predict` are compiled, and cannot tell that
    the tower has changed. `index.is_stale` tells, and direct calls of the index and saving warn.

    Args:
        retrieval: a `keras_rs.layers.BruteForceRetrieval` without candidates; its `k`, `return_scores` and name are
            kept.
        candidate_tower: a `keras.layers.Embedding`, or any layer or model that maps candidates to
            `[num_candidates, embedding_dim]`.
        candidates: the tower's inputs for the whole corpus: an array, or a nested structure of arrays with one row for
            each candidate. Required for a tower that is not an embedding, and an error for one that is.
        candidate_ids: `[num_candidates]` ints, what is returned for each candidate; by default its row number. With
            `vocabularies`, names of one of them.
        vocabularies: the `Vocabulary` of each feature of `candidates` that holds names, by the name of the feature. The
            index takes the ids from the feature `candidate_id` of its `TwoTowerModel`, which also hands over its own
            vocabularies.
        exclude_ids: ids of candidates that are never returned.
        similarity: `"dot"`, `"cosine"` to L2-normalize both sides before scoring, or `"biased_cosine"`, as in
            `DistributedTwoTowerTask`.
        mesh_axis: the axis of the mesh in force over which the rows of the index are split. `None` follows the table's
            own layout. Without a distribution the table stays whole. The rows of a plain `keras.layers.Embedding` must
            divide over the axis; those of a `ShardedEmbedding` are padded. Set it before the optimizer is built:
            existing slots keep their layout.
        block_size: the number of scores that each device computes at once, 4 bytes each; by default 2**26, which is
            256 MiB. A call needs about that much memory in addition to the table, `ranks` twice that. A smaller block
            scores fewer queries at once, which takes longer if there are many candidates.
        recall_target: the share of the exact top-k, in (0, 1], that is enough. On a TPU, `jax.lax.approx_max_k` then
            finds about that share on average, in less time. On other devices, and by default, all are found.

    Returns:
        A `ShardedBruteForceRetrieval`.

    Raises:
        TypeError: if `retrieval` is not a plain `BruteForceRetrieval`, the tower is not a layer, or ids are not
            integers.
        ValueError: if `retrieval` holds candidates, `k` exceeds the number of candidates, `candidates` are missing or
            superfluous, ids are out of range, the mesh has no such axis, or the rows do not divide over it.

    Example:
    ```python
    movie_tower = keras.layers.Embedding(1683, 32)
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=10), movie_tower, exclude_ids=[0])
    scores, movie_ids = index(keras.random.normal((4, 32)))
    ```
    """
    if not isinstance(retrieval, keras_rs.layers.BruteForceRetrieval):
        raise TypeError(
            "`retrieval` must be a `keras_rs.layers.BruteForceRetrieval`. "
            f"Received: {retrieval!r} (of type {type(retrieval).__name__}). Pass `BruteForceRetrieval(k=...)`."
        )
    if type(retrieval).compute_score is not keras_rs.layers.BruteForceRetrieval.compute_score:
        raise TypeError(
            "`retrieval` must score like `BruteForceRetrieval`, because the index computes the scores. Received: "
            f"{type(retrieval).__name__}, which overrides `compute_score`. Pass a plain one, and choose `similarity`."
        )
    if retrieval.candidate_embeddings is not None:
        raise ValueError(
            "`retrieval` must not hold candidates of its own, which the tower's would replace. Received: "
            f"a layer with {retrieval.candidate_embeddings.shape[0]} candidates. "
            f"Pass a new `BruteForceRetrieval(k={retrieval.k})`, and ids as `candidate_ids`."
        )
    if not isinstance(candidate_tower, keras.layers.Layer):
        raise TypeError(
            "`candidate_tower` must be a Keras layer or model. "
            f"Received: {candidate_tower!r} (of type {type(candidate_tower).__name__}). "
            "Pass the layer that embeds the candidates, and not its table or its output."
        )
    if is_table(candidate_tower) and candidates is not None:
        raise ValueError(
            "The index of an embedding is its whole table and takes no `candidates`. Received: "
            "both. Drop `candidates`; exclude rows with `exclude_ids`."
        )
    if not is_table(candidate_tower) and candidates is None:
        raise ValueError(
            "The index of a tower that is not a plain `keras.layers.Embedding` needs the tower's inputs for the whole "
            f"corpus. Received: a {type(candidate_tower).__name__} and candidates=None. Pass `candidates`, "
            "for instance `candidates=np.arange(num_candidates)` if the tower takes row numbers."
        )
    check_mesh_axis(mesh_axis)
    if is_table(candidate_tower):
        _prepare_table(candidate_tower, mesh_axis)
    return ShardedBruteForceRetrieval(
        candidate_tower,
        candidates=candidates,
        candidate_ids=candidate_ids,
        vocabularies=vocabularies,
        exclude_ids=exclude_ids,
        similarity=similarity,
        mesh_axis=mesh_axis,
        block_size=block_size,
        recall_target=recall_target,
        k=retrieval.k,
        return_scores=retrieval.return_scores,
        name=retrieval.name,
    )


def _prepare_table(tower: keras.layers.Embedding, mesh_axis: str | None) -> None:
    """Passes the mesh axis on to a table that can still be created with it, or checks that its rows divide."""
    if isinstance(tower, ShardedEmbedding) and not tower.built:
        tower.mesh_axis = tower.mesh_axis or mesh_axis
    elif not _keras.is_loading():
        # A file loads on any mesh: a table whose rows do not divide then stays whole.
        path = f"{tower.path or tower.name}/embeddings"
        num_rows = tower.num_padded_rows if isinstance(tower, ShardedEmbedding) else tower.input_dim
        check_rows_divide(num_rows, axis_of_rows(mesh_axis, path), path)
