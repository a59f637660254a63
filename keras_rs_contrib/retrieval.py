"""The candidate index: `BruteForceRetrieval` tied to the candidate tower."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import jax
import keras
import keras_rs
import numpy as np
from keras import ops

from keras_rs_contrib import distribution, losses, top_k
from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.candidate_ids import NO_CANDIDATE, check_corpus_ids, check_exclude_ids, to_int32
from keras_rs_contrib.padded_variable import add_table, replace_rows
from keras_rs_contrib.row_sparse_embedding import RowSparseEmbedding
from keras_rs_contrib.sharded_embedding import ShardedEmbedding, shard

# Candidates that go through a feature tower at once: enough to keep it busy, little beside the tower's own memory.
REFRESH_BLOCK_SIZE = 4096
# Blocks from which on a refresh shows a progress bar.
MANY_BLOCKS = 16
# Up to so many excluded candidates are found with the others and dropped, which costs a longer top-k; more of them are
# masked, which costs a pass over the scores.
MAX_DROPPED = 16


def shard_candidates(
    retrieval: keras_rs.layers.BruteForceRetrieval,
    candidate_tower: keras.layers.Layer,
    *,
    candidates: Any = None,
    candidate_ids: Any = None,
    exclude_ids: Iterable[int] = (),
    similarity: str = "dot",
    mesh_axis: str | None = None,
    block_size: int | None = None,
    recall_target: float | None = None,
) -> ShardedBruteForceRetrieval:
    """Ties a retrieval layer to the tower that embeds the candidates.

    Of an embedding tower, the index is the tower's own variable: there is no copy, a prediction sees the last training
    step, and the table is saved once. Of any other tower, the index is a weight that holds the tower's output for
    `candidates`; `refresh()` computes it anew after training.

    Args:
        retrieval: a `keras_rs.layers.BruteForceRetrieval` without candidates; its `k`, `return_scores` and name are
            kept.
        candidate_tower: a `keras.layers.Embedding`, or any layer or model that maps candidates to
            `[num_candidates, embedding_dim]`. A plain embedding that is not built yet becomes a
            `keras_rs_contrib.ShardedEmbedding`, whose rows can be split whatever their number.
        candidates: the tower's inputs for the whole corpus: an array, or a nested structure of arrays with one row a
            candidate. Needed with a tower that is no embedding, and only there.
        candidate_ids: `[num_candidates]` ints, what is returned for each candidate; by default the number of its row.
        exclude_ids: ids of candidates that are never returned.
        similarity: `"dot"`, or `"cosine"` to L2-normalise both sides before scoring.
        mesh_axis: the axis of the mesh in force over which the rows of the index are split. `None` follows the table's
            own layout. Without a distribution the table stays whole. Name it before the model is trained: an optimizer
            that is built already keeps its slots whole.
        block_size: how many scores are made at once on each device, 4 bytes each; by default 2**26, which is 256 MiB.
            A call needs about that beside the table, `ranks` twice that. A smaller block scores fewer queries at once,
            which takes longer where there are many candidates.
        recall_target: the share of the exact top-k, in (0, 1], that is enough. On a TPU, `jax.lax.approx_max_k` then
            finds about that share on average, in less time, and which candidates it misses is not known beforehand.
            Elsewhere, and by default, all are found.

    Returns:
        A `ShardedBruteForceRetrieval`.

    Raises:
        TypeError: if `retrieval` is no plain `BruteForceRetrieval`, the tower no layer, or ids are no integers.
        ValueError: if `retrieval` holds candidates, `k` is more than there are candidates, `candidates` are missing or
            not wanted, ids are out of range, the mesh has no such axis, or the rows of a table that is built already
            do not divide over it.

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
            "`retrieval` must score as `BruteForceRetrieval` does: the index scores by itself. Received: "
            f"{type(retrieval).__name__}, which overrides `compute_score`. Pass a plain one, and choose `similarity`."
        )
    if retrieval.candidate_embeddings is not None:
        raise ValueError(
            "`retrieval` must not hold candidates of its own, which the tower's would replace. Received: "
            f"a layer with {retrieval.candidate_embeddings.shape[0]} candidates. "
            f"Pass a fresh `BruteForceRetrieval(k={retrieval.k})`, and ids as `candidate_ids`."
        )
    if not isinstance(candidate_tower, keras.layers.Layer):
        raise TypeError(
            "`candidate_tower` must be a Keras layer or model. "
            f"Received: {candidate_tower!r} (of type {type(candidate_tower).__name__}). Wrap it in a layer."
        )
    if is_table(candidate_tower) and candidates is not None:
        raise ValueError(
            "The index of an embedding is its whole table, live, and takes no `candidates`. Received: "
            "both. Drop `candidates`; name the rows to leave out in `exclude_ids`."
        )
    if not is_table(candidate_tower) and candidates is None:
        raise ValueError(
            "The index of a tower that is no plain `keras.layers.Embedding` needs the tower's inputs for the whole "
            f"corpus. Received: a {type(candidate_tower).__name__} and candidates=None. Pass `candidates`, "
            "for instance `candidates=np.arange(num_candidates)` where the tower takes row numbers."
        )
    distribution.check_mesh_axis(mesh_axis)
    if is_table(candidate_tower):
        _prepare_rows(candidate_tower, mesh_axis)
    return ShardedBruteForceRetrieval(
        candidate_tower,
        candidates=candidates,
        candidate_ids=candidate_ids,
        exclude_ids=exclude_ids,
        similarity=similarity,
        mesh_axis=mesh_axis,
        block_size=block_size,
        recall_target=recall_target,
        k=retrieval.k,
        return_scores=retrieval.return_scores,
        name=retrieval.name,
    )


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class ShardedBruteForceRetrieval(keras_rs.layers.BruteForceRetrieval):  # type: ignore[misc]
    """Exact top-k over the live table of a candidate tower, on one device or many. Made by `shard_candidates`.

    Called with query embeddings `[batch, embedding_dim]`, it returns `(scores, ids)`, both `[batch, k]`, float32 and
    int32, best first, equal scores by lower row; with `return_scores=False` the ids alone. `exclude_ids` names
    candidates that a query is not to get. `ranks` gives the place of one candidate in a query's whole list.

    A table that every device holds is scored by each for its own part of the batch, without traffic; of a table whose
    rows are split, the devices exchange their best k rows a query. Scores are made in blocks, and sums are float32
    whatever the dtype of the tower. A score that is no number counts as -inf.

    The tower is a layer of the index: what is set for the index, such as `trainable`, is set for the tower too.
    Within one `.keras` file the tower is saved once, and what is loaded shares it again with the model.
    `keras.models.clone_model` copies layer by layer, and so gives the index a tower of its own: use `copy.deepcopy`.

    Args:
        candidate_tower: see `shard_candidates`, also for the arguments that follow.
        candidates: the tower's inputs for the whole corpus.
        candidate_ids: `[num_candidates]` ints.
        exclude_ids: ids that are never returned.
        similarity: `"dot"` or `"cosine"`.
        mesh_axis: the mesh axis over which the rows are split.
        block_size: how many scores are made at once on each device.
        recall_target: the share of the exact top-k that is enough on a TPU.
        k: how many candidates to return.
        return_scores: whether to return the scores beside the ids.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        candidate_tower: keras.layers.Layer,
        candidates: Any = None,
        candidate_ids: Any = None,
        exclude_ids: Iterable[int] = (),
        similarity: str = "dot",
        mesh_axis: str | None = None,
        block_size: int | None = None,
        recall_target: float | None = None,
        k: int = 10,
        return_scores: bool = True,
        **kwargs: Any,
    ) -> None:
        k = positive_int(k, "k")
        block_size = None if block_size is None else positive_int(block_size, "block_size")
        _check_recall_target(recall_target)
        losses.check_similarity(similarity)
        tied = is_table(candidate_tower)
        excluded = check_exclude_ids(exclude_ids)
        if tied or candidates is not None:
            num_candidates = candidate_tower.input_dim if tied else _num_rows(candidates)
            candidate_ids = check_corpus_ids(candidate_ids, num_candidates, excluded)
        # A mixed precision policy in force would copy the table at each call, rounded.
        kwargs.setdefault("dtype", "float32")
        super().__init__(k=k, return_scores=return_scores, autocast=False, **kwargs)
        self.candidate_tower = candidate_tower
        self.exclude_ids = excluded
        self.similarity = similarity
        self.mesh_axis = mesh_axis
        self.block_size = block_size
        self.recall_target = recall_target
        self.supports_masking = True
        self._tied = tied
        self._keep(candidates)
        self._refreshed_embeddings: keras.Variable | None = None
        if tied or candidates is not None:
            self._check_k(num_candidates, len(excluded))
        if self._tied:
            if candidate_ids is not None:
                self._add_candidate_ids(candidate_tower.input_dim, candidate_ids)
            if candidate_tower.built:
                self._split_rows()
        elif candidates is not None:
            self._assign_table(self._embed(candidates), candidate_ids)

    @property
    def candidate_embeddings(self) -> Any:
        """The `[num_candidates, embedding_dim]` table that is searched, or `None` where it is not built yet."""
        if not self._tied:
            return self._refreshed_embeddings
        if getattr(self.candidate_tower, "quantization_mode", None) is not None:
            raise ValueError(
                "The index searches the floating-point table of its tower. Received: "
                f"a tower quantized to {self.candidate_tower.quantization_mode}. Keep the candidate tower unquantized."
            )
        return self.candidate_tower.embeddings if self.candidate_tower.built else None

    @candidate_embeddings.setter
    def candidate_embeddings(self, value: Any) -> None:
        # The base class clears the attribute first of all.
        if value is not None:
            if isinstance(value, keras.Variable):
                self._untrack_variable(value)
            raise AttributeError(
                "`candidate_embeddings` belongs to the candidate tower of the index. Received: an assignment. "
                "Drop it: `shard_candidates` has tied the two, and no build or update is needed."
            )

    @property
    def is_tied(self) -> bool:
        """Whether the index is the table of its tower, and not a copy of the tower's output."""
        return self._tied

    @property
    def num_candidates(self) -> int | None:
        """How many candidates there are, or `None` before the first refresh."""
        if self._tied:
            return int(self.candidate_tower.input_dim)
        return None if self._refreshed_embeddings is None else int(self._refreshed_embeddings.shape[0])

    @property
    def has_candidates(self) -> bool:
        """Whether the index over a feature tower has the tower's inputs, which are not saved with it."""
        return self._candidates is not None

    def update_candidates(self, candidate_embeddings: Any, candidate_ids: Any = None) -> None:
        """Replaces the embeddings of an index over a feature tower; an error on a tied index.

        Args:
            candidate_embeddings: `[num_candidates, embedding_dim]` float, of the dimension that the index has.
            candidate_ids: `[num_candidates]` ints, or `None` to keep the present ones.

        Raises:
            ValueError: if the index is tied to an embedding, or shapes or ids do not fit.
        """
        if self._tied:
            raise ValueError(
                "`update_candidates` would overwrite the trained table of the candidate tower, which is the index. "
                f"Received: new embeddings for an index tied to {self.candidate_tower.name!r}. Train the tower, or "
                "assign to its `embeddings`; for a table of other candidates make a new index."
            )
        self._validate_candidate_embeddings_and_ids(candidate_embeddings, candidate_ids)
        candidate_ids = self._check_corpus(candidate_embeddings.shape[0], candidate_ids)
        self._assign_table(candidate_embeddings, candidate_ids)

    def refresh(self, candidates: Any = None, candidate_ids: Any = None, verbose: int | str = "auto") -> None:
        """Runs the candidates through the tower again, for an index over a feature tower.

        A tied index is never stale, and stays as it is. If the tower fails, the old index stays whole.

        Args:
            candidates: the tower's inputs for the whole corpus, which may have grown or shrunk; `None` for those given
                last. They are not saved with the index: after loading, give them anew.
            candidate_ids: `[num_candidates]` ints, the ids of `candidates`; `None` to keep the present ones. Those of
                `exclude_ids` that are no longer among them are of no effect.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one where the corpus is large.

        Raises:
            TypeError: if candidates are no arrays, or ids no integers.
            ValueError: if there are no candidates, fewer than `k`, their number differs from that of their ids, or the
                tower's output is no finite `[num_candidates, embedding_dim]`.
        """
        if self._tied:
            if candidates is not None or candidate_ids is not None:
                raise ValueError(
                    "The index of an embedding is its whole table, live, and takes no `candidates`. Received: "
                    f"new ones for an index tied to {self.candidate_tower.name!r}. Make a new index."
                )
            return
        candidates = self._candidates if candidates is None else candidates
        if candidates is None:
            raise ValueError(
                "The index needs the tower's inputs for the whole corpus. Received: candidates=None, and none before: "
                "inputs are not saved with the index. Pass them: `refresh(candidates)`."
            )
        # Before the tower runs, which may take long.
        candidate_ids = self._check_corpus(_num_rows(candidates), candidate_ids)
        self._assign_table(self._embed(candidates, verbose), candidate_ids)
        self._keep(candidates)

    def build(self, input_shape: Any) -> None:
        """Builds the candidate tower, where it is an embedding, and lays out its table."""
        if self._tied and not self.candidate_tower.built:
            # In the scope around the index: a layout map, and a file loaded, know the table by the path that it would
            # have without the index.
            grandparent, _, parent = self.path.rpartition("/")[0].rpartition("/")
            with keras.name_scope(parent, override_parent=grandparent):
                self.candidate_tower.build((None,))
        if self.candidate_embeddings is None:
            raise ValueError(
                "The index has no candidates yet. Received: a call before `refresh`. "
                "Run the corpus through the tower first: `refresh(candidates)`."
            )
        self._check_k(self.candidate_embeddings.shape[0])
        if self._tied:
            self._split_rows()

    def __call__(self, query_embeddings: Any, exclude_ids: Any = None, **kwargs: Any) -> Any:
        """Returns what `call` does."""
        if exclude_ids is not None:
            # Keras would make int32 of any integers, and so of 2**32 + 5 the id of another candidate.
            exclude_ids = to_int32(exclude_ids, "exclude_ids")
            kwargs["exclude_ids"] = exclude_ids
        return super().__call__(query_embeddings, **kwargs)

    def call(self, query_embeddings: Any, exclude_ids: Any = None) -> Any:
        """Returns the candidates that score highest for each query.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            exclude_ids: `[batch, m]` int32, candidates that the query is not to get, at the cost of a top-(k+m). -1,
                and ids that no candidate has, are of no effect. `None` for none.

        Returns:
            `(scores, ids)`, `[batch, k]` float32 and int32, best first, or the ids alone. Where fewer than k candidates
            remain, the rest are -inf and -1. A query that is not a number gets NaN and -1 alone.

        Raises:
            ValueError: if the shape of the queries does not fit the table's, or that of `exclude_ids` the queries'.
        """
        scores, ids = self.find(query_embeddings, self.k, exclude_ids)
        return (scores, ids) if self.return_scores else ids

    def find(self, query_embeddings: Any, k: int, exclude_ids: Any = None) -> tuple[Any, Any]:
        """Returns the k candidates that score highest for each query, whatever `k` and `return_scores` of the index.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            k: positive int.
            exclude_ids: `[batch, m]` int32, as in a call.

        Returns:
            `(scores, ids)`, `[batch, k]` float32 and int32, as of a call.

        Raises:
            ValueError: as a call, and if `k` is more than there are candidates.
        """
        if not self.built:
            self.build(query_embeddings.shape)
        table = self.candidate_embeddings
        self._check_queries(query_embeddings, exclude_ids)
        self._check_k(table.shape[0], k=k)
        search = self._search()
        excluded = None
        if len(self.exclude_ids) > MAX_DROPPED:
            excluded = self._excluded_rows()
        elif self.exclude_ids:
            exclude_ids = self._with_own_exclude_ids(exclude_ids, ops.shape(query_embeddings)[0])
        scores, ids = top_k.top_k(
            top_k.on_mesh(query_embeddings, search.layout),
            ops.convert_to_tensor(table),
            k=k,
            search=search,
            candidate_ids=None
            if self.candidate_ids is None
            else top_k.on_mesh(self.candidate_ids.value, search.layout),
            exclude_ids=top_k.on_mesh(exclude_ids, search.layout),
            excluded=excluded,
        )
        return scores, ids

    def ranks(self, query_embeddings: Any, candidate_ids: Any, exclude_ids: Any = None) -> Any:
        """Returns the place of candidates in each query's list of the whole corpus, without a top-k.

        The list is that of a call with `k` the number of candidates: the rank counts the candidates that score higher,
        and those that score the same in a lower row.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            candidate_ids: `[batch]` int, the candidate of each query, or `[batch, n]` for several; -1 for none.
            exclude_ids: `[batch, m]` int, candidates that the query is not to get, as in a call.

        Returns:
            int32, shape of `candidate_ids`, 0 is best and -1 the rank of none. The number of candidates, which no list
            is long enough for, where the candidate is excluded, or the query is not a number, or, while compiling, the
            id is that of no candidate.

        Raises:
            TypeError: if ids are no integers.
            ValueError: if shapes do not fit, or an id is that of no candidate.
        """
        if keras.backend.backend() != "jax":
            raise NotImplementedError(
                f"`ranks` needs the JAX backend. Received: {keras.backend.backend()!r}. Set KERAS_BACKEND=jax."
            )
        query_embeddings = ops.convert_to_tensor(query_embeddings)
        if not self.built:
            self.build(query_embeddings.shape)
        candidate_ids = ops.convert_to_tensor(to_int32(candidate_ids, "candidate_ids"))
        if exclude_ids is not None:
            exclude_ids = ops.convert_to_tensor(to_int32(exclude_ids, "exclude_ids"))
        self._check_queries(query_embeddings, exclude_ids)
        shape = tuple(candidate_ids.shape)
        if len(shape) not in (1, 2) or shape[0] != query_embeddings.shape[0]:
            raise ValueError(
                "`candidate_ids` needs one id for each query, or a row of them. Received: "
                f"shape {shape} for {query_embeddings.shape[0]} queries. Pass a flat list, or rows filled with "
                f"{NO_CANDIDATE}."
            )
        search = self._search()
        num_candidates = search.num_candidates
        # All ids at once: to look them up, the corpus is sorted.
        ids = candidate_ids if len(shape) == 2 else ops.expand_dims(candidate_ids, 1)
        all_rows = self._rows_of(ids if exclude_ids is None else ops.concatenate([ids, exclude_ids], axis=1))
        rows, exclude_rows = all_rows[:, : ids.shape[1]], None if exclude_ids is None else all_rows[:, ids.shape[1] :]
        is_none = ops.equal(ids, NO_CANDIDATE)
        _check_known(ids, rows, is_none, num_candidates)
        unlisted = ops.equal(rows, num_candidates)
        if exclude_ids is not None:
            unlisted = ops.logical_or(unlisted, top_k.contains(exclude_ids, ids))
        excluded = None
        if self.exclude_ids:
            excluded = self._excluded_rows()
            unlisted = ops.logical_or(unlisted, ops.take(excluded, ops.minimum(rows, num_candidates - 1), axis=0))
        ranks = top_k.ranks(
            top_k.on_mesh(query_embeddings, search.layout),
            ops.convert_to_tensor(self.candidate_embeddings),
            top_k.on_mesh(rows, search.layout),
            search=search,
            exclude_rows=top_k.on_mesh(exclude_rows, search.layout),
            excluded=excluded,
        )
        ranks = ops.where(top_k.on_mesh(unlisted, search.layout), num_candidates, ranks)
        ranks = ops.where(top_k.on_mesh(is_none, search.layout), NO_CANDIDATE, ranks)
        return ops.reshape(ranks, shape)

    def compute_score(self, query_embedding: Any, candidate_embedding: Any) -> Any:
        """Returns the `[num_queries, num_candidates]` float32 scores by which the index ranks."""
        return top_k.scores(query_embedding, candidate_embedding, self.similarity)

    def compute_output_spec(self, query_embeddings: Any, exclude_ids: Any = None) -> Any:
        """Returns the shapes and dtypes of the result."""
        self._check_queries(query_embeddings, exclude_ids)
        shape = (query_embeddings.shape[0], self.k)
        ids = keras.KerasTensor(shape, dtype="int32")
        return (keras.KerasTensor(shape, dtype="float32"), ids) if self.return_scores else ids

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: a list of candidates carries no mask."""
        return

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized, without candidates and their ids, which are weights."""
        config: dict[str, Any] = super().get_config()
        # Twice: within a file, Keras marks an object as shared from its second occurrence on, and marks the first
        # belatedly, in a dict of which the config of this layer will by then be a copy. Unmarked, the tower would be
        # loaded apart from the model's own wherever the index comes before it.
        for _ in range(2):
            candidate_tower = keras.saving.serialize_keras_object(self.candidate_tower)
        config.update(
            candidate_tower=candidate_tower,
            exclude_ids=list(self.exclude_ids),
            similarity=self.similarity,
            mesh_axis=self.mesh_axis,
            block_size=self.block_size,
            recall_target=self.recall_target,
            k=self.k,
            return_scores=self.return_scores,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ShardedBruteForceRetrieval:
        """Returns the index that `get_config` describes; `build_from_config` makes its weights."""
        config = dict(config)
        tower = config.pop("candidate_tower")
        if not isinstance(tower, keras.layers.Layer):
            tower = keras.saving.deserialize_keras_object(tower)
        # Set apart: the ids of which they are come only with the weights.
        exclude_ids = config.pop("exclude_ids")
        index = cls(tower, **config)
        index.exclude_ids = exclude_ids
        return index

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns which weights the index has."""
        if self.candidate_embeddings is None and self.candidate_ids is None:
            return None
        return {
            "has_table": self.candidate_embeddings is not None,
            "table_shape": None if self._tied else list(self._refreshed_embeddings.shape),  # type: ignore[union-attr]
            "has_candidate_ids": self.candidate_ids is not None,
        }

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Makes the weights that `get_build_config` names, for the file's values to be loaded into."""
        if not config:
            return
        if config["table_shape"] is not None:
            self._add_table(tuple(config["table_shape"]))
            num_candidates = config["table_shape"][0]
        else:
            num_candidates = self.candidate_tower.input_dim
        if config["has_candidate_ids"]:
            self._add_candidate_ids(num_candidates)
        if config["has_table"]:
            self.build((None, None))

    def _keep(self, candidates: Any) -> None:
        # Past Keras's tracking of attributes, which would turn dicts into ones that a functional tower refuses.
        object.__setattr__(self, "_candidates", candidates)

    def _embed(self, candidates: Any, verbose: int | str = "auto") -> np.ndarray[Any, Any]:
        """Returns the tower's `[num_candidates, embedding_dim]` output for the candidates, computed in blocks."""
        num_candidates = _num_rows(candidates)
        starts = range(0, num_candidates, REFRESH_BLOCK_SIZE)
        if verbose == "auto":
            verbose = int(len(starts) > MANY_BLOCKS)
        progress = keras.utils.Progbar(num_candidates, verbose=verbose, unit_name="candidate")
        blocks = []
        for start in starts:
            stop = min(start + REFRESH_BLOCK_SIZE, num_candidates)
            block = keras.tree.map_structure(lambda array, rows=slice(start, stop): array[rows], candidates)
            embeddings = ops.convert_to_numpy(self.candidate_tower(block, training=False)).astype("float32")
            if embeddings.ndim != 2 or embeddings.shape[0] != stop - start:
                raise ValueError(
                    "The candidate tower must map candidates to `[num_candidates, embedding_dim]`. Received: "
                    f"shape {embeddings.shape} for {stop - start} candidates. Flatten its output to one row each."
                )
            blocks.append(embeddings)
            progress.update(stop)
        return np.concatenate(blocks)

    def _check_corpus(self, num_candidates: int, candidate_ids: Any) -> Any:
        """Returns the ids of new candidates as int32, or `None` to keep the present ones, or raises."""
        table = self._refreshed_embeddings
        if table is None:
            candidate_ids = check_corpus_ids(candidate_ids, num_candidates, self.exclude_ids)
        elif candidate_ids is not None:
            candidate_ids = check_corpus_ids(candidate_ids, num_candidates, [])
            if self.candidate_ids is None:
                raise ValueError(
                    "An index without ids returns row numbers and keeps doing so. Received: `candidate_ids`. "
                    "Make a new index with `shard_candidates`."
                )
        changes = table is not None and num_candidates != table.shape[0]
        if changes and keras.backend.backend() != "jax":
            raise NotImplementedError(
                "An index whose number of candidates changes needs the JAX backend. Received: "
                f"{num_candidates} candidates on {keras.backend.backend()!r}. "
                "Make a new index with `shard_candidates`, or set KERAS_BACKEND=jax."
            )
        if changes and candidate_ids is None and self.candidate_ids is not None:
            raise ValueError(
                "An index with ids needs those of the new candidates where their number changes. Received: "
                f"candidate_ids=None for {num_candidates} candidates instead of {self.candidate_ids.shape[0]}. "
                "Pass `candidate_ids`."
            )
        present = candidate_ids if candidate_ids is not None else self.candidate_ids
        if present is None:
            present = np.arange(num_candidates)
        self._check_k(num_candidates, int(np.isin(self.exclude_ids, ops.convert_to_numpy(present)).sum()))
        return candidate_ids

    def _assign_table(self, embeddings: Any, candidate_ids: Any) -> None:
        """Assigns embeddings, which are checked here, and ids, which have been."""
        shape = tuple(embeddings.shape)
        finite = np.isfinite(ops.convert_to_numpy(embeddings)).all(axis=1)
        if not finite.all():
            raise ValueError(
                "The embeddings of candidates must be finite. Received: NaN or infinity for candidate "
                f"{int(np.argmin(finite))}. Check the inputs of the tower: an id outside a table gives NaN."
            )
        table = self._refreshed_embeddings
        if table is None:
            # The table first, as in `build_from_config`: a file knows weights by their order.
            self._add_table(shape)
            if candidate_ids is not None:
                self._add_candidate_ids(shape[0], candidate_ids)
        else:
            if table.shape[1] != shape[1]:
                raise ValueError(
                    "An index keeps its dimension. Received: "
                    f"embeddings of shape {shape} for an index of shape {tuple(table.shape)}. "
                    "Make a new index with `shard_candidates`."
                )
            if candidate_ids is not None:
                replace_rows(self.candidate_ids, candidate_ids, None)
        replace_rows(self._refreshed_embeddings, embeddings, self.mesh_axis)

    def _add_candidate_ids(self, num_candidates: int, candidate_ids: Any = None) -> None:
        self.candidate_ids = self.add_weight(
            shape=(num_candidates,), initializer="zeros", dtype="int32", trainable=False, name="candidate_ids"
        )
        if candidate_ids is not None:
            self.candidate_ids.assign(candidate_ids)

    def _add_table(self, shape: tuple[int, int]) -> None:
        name = "candidate_embeddings"
        self._refreshed_embeddings = add_table(
            self.add_weight,
            f"{self.path or self.name}/{name}",
            shape,
            "zeros",
            self.mesh_axis,
            trainable=False,
            autocast=False,
            name=name,
        )

    def _split_rows(self) -> None:
        table = self.candidate_embeddings
        # With LoRA enabled, the table is a sum that the tower computes: there is no variable to lay out.
        if self.mesh_axis is not None and isinstance(table, keras.Variable):
            # Together with what a row-sparse table keeps for its rows.
            for variable in (table, *getattr(table, "slots", ())):
                distribution.split_rows(variable, self.mesh_axis)

    def _search(self) -> top_k.Search:
        table = self.candidate_embeddings
        return top_k.Search(
            num_candidates=table.shape[0],
            similarity=self.similarity,
            block_size=self.block_size or top_k.BLOCK_SIZE,
            recall_target=self.recall_target,
            layout=distribution.table_layout(table),
        )

    def _with_own_exclude_ids(self, exclude_ids: Any, num_queries: Any) -> Any:
        own = ops.convert_to_tensor(self.exclude_ids, dtype="int32")
        own = ops.broadcast_to(ops.expand_dims(own, 0), (num_queries, len(self.exclude_ids)))
        return own if exclude_ids is None else ops.concatenate([exclude_ids, own], axis=1)

    def _excluded_rows(self) -> Any:
        """Returns `[num_rows]` bool, of the rows on the mesh: True for the index's own exclusions, and for padding."""
        table = self.candidate_embeddings
        num_rows = getattr(table, "num_rows_on_mesh", table.shape[0])
        if self.candidate_ids is None:
            excluded = np.zeros(table.shape[0], bool)
            excluded[[i for i in self.exclude_ids if 0 <= i < table.shape[0]]] = True
        else:
            own = ops.convert_to_tensor(self.exclude_ids, dtype="int32")
            places = ops.searchsorted(own, ops.convert_to_tensor(self.candidate_ids))
            places = ops.minimum(places, len(self.exclude_ids) - 1)
            excluded = ops.equal(ops.take(own, places, axis=0), self.candidate_ids)
        return ops.pad(excluded, (0, num_rows - table.shape[0]), constant_values=True)

    def _rows_of(self, ids: Any) -> Any:
        """Returns the row of each candidate, the number of candidates for an id that is of none."""
        num_candidates = self.candidate_embeddings.shape[0]
        if self.candidate_ids is None:
            known = ops.logical_and(ops.greater_equal(ids, 0), ops.less(ids, num_candidates))
            return ops.where(known, ids, num_candidates)
        all_ids = ops.convert_to_tensor(self.candidate_ids)
        order = ops.argsort(all_ids)
        places = ops.searchsorted(ops.take(all_ids, order, axis=0), ops.reshape(ids, (-1,)))
        rows = ops.reshape(ops.take(order, ops.minimum(places, num_candidates - 1), axis=0), ops.shape(ids))
        known = ops.equal(ops.take(all_ids, rows, axis=0), ids)
        return ops.where(known, ops.cast(rows, "int32"), num_candidates)

    def _check_k(self, num_candidates: int, num_excluded: int = 0, k: int | None = None) -> None:
        remaining = num_candidates - num_excluded
        k = positive_int(self.k if k is None else k, "k")
        if k > remaining:
            raise ValueError(
                "`k` must not be more than the number of candidates. Received: "
                f"k={k} for {num_candidates} candidates, {num_excluded} of them excluded. "
                f"Ask for at most {remaining}."
            )

    def _check_queries(self, query_embeddings: Any, exclude_ids: Any = None) -> None:
        dimension = self.candidate_embeddings.shape[1]
        shape = tuple(query_embeddings.shape)
        if len(shape) != 2 or shape[1] not in (None, dimension):
            raise ValueError(
                f"Query embeddings must have shape (batch, {dimension}), as the candidates' dimension is {dimension}. "
                f"Received: shape {shape}. Pass one row for each query, from a query tower of that dimension."
            )
        if exclude_ids is None:
            return
        exclude_shape = tuple(exclude_ids.shape)
        if len(exclude_shape) != 2 or (None not in (exclude_shape[0], shape[0]) and exclude_shape[0] != shape[0]):
            raise ValueError(
                "`exclude_ids` must have shape (batch, m), with one row for each query. Received: "
                f"shape {exclude_shape} for query embeddings of shape {shape}. Fill short rows with {NO_CANDIDATE}."
            )


def _check_recall_target(recall_target: Any) -> None:
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


def _check_known(candidate_ids: Any, rows: Any, is_none: Any, num_candidates: int) -> None:
    """Raises `ValueError` where an id is that of no candidate, if the values are there to look at."""
    if isinstance(rows, jax.core.Tracer):
        return
    unknown = ops.convert_to_numpy(ops.logical_and(ops.equal(rows, num_candidates), ops.logical_not(is_none)))
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise ValueError(
            "`candidate_ids` must be ids of candidates. Received: "
            f"{int(ops.convert_to_numpy(candidate_ids)[row, column])} in row {row}, which is none of the "
            f"{num_candidates}. Put {NO_CANDIDATE} there, for none."
        )


def _num_rows(candidates: Any) -> int:
    """Returns how many rows each of the arrays has."""
    arrays = keras.tree.flatten(candidates)
    if not all(hasattr(array, "shape") and len(array.shape) > 0 for array in arrays):
        raise TypeError(
            "`candidates` must be an array or a nested structure of arrays, with one row for each candidate. Received: "
            f"{type(candidates).__name__}. Convert lists and datasets to arrays first."
        )
    lengths = sorted({int(array.shape[0]) for array in arrays})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            "`candidates` must be arrays with one row for each candidate, and at least one. Received: "
            f"arrays of lengths {lengths}. Pass the inputs of the whole corpus."
        )
    return lengths[0]


def is_table(tower: keras.layers.Layer) -> bool:
    """Returns whether the tower's output is a row of its table and nothing more."""
    calls = (keras.layers.Embedding.call, ShardedEmbedding.call, RowSparseEmbedding.call)
    return isinstance(tower, keras.layers.Embedding) and type(tower).call in calls


def _prepare_rows(tower: keras.layers.Embedding, mesh_axis: str | None) -> None:
    """Lets the rows of an embedding be split, whatever their number, or raises where that is too late."""
    if isinstance(tower, ShardedEmbedding):
        if mesh_axis is not None and not tower.built and tower.mesh_axis is None:
            tower.mesh_axis = mesh_axis
        return
    if type(tower) is keras.layers.Embedding and not tower.built:
        # On one device too: the class is in the names of a file, which is to load on any mesh.
        shard(tower, mesh_axis)
    else:
        distribution.check_divides(tower.input_dim, mesh_axis, f"{tower.path or tower.name}/embeddings")
