"""The candidate index: `BruteForceRetrieval` tied to the candidate tower."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import keras
import keras_rs
import numpy as np
from keras import ops

from keras_rs_contrib import distribution, losses, top_k
from keras_rs_contrib.candidate_ids import NO_CANDIDATE, check_corpus_ids, check_exclude_ids

# Candidates that go through a feature tower at once: enough to keep it busy, little beside the tower's own memory.
REFRESH_BLOCK_SIZE = 4096


def shard_candidates(
    retrieval: keras_rs.layers.BruteForceRetrieval,
    candidate_tower: keras.layers.Layer,
    *,
    candidates: Any = None,
    candidate_ids: Any = None,
    exclude_ids: Iterable[int] = (),
    similarity: str = "dot",
    mesh_axis: str | None = None,
) -> ShardedBruteForceRetrieval:
    """Ties a retrieval layer to the tower that embeds the candidates.

    Of an embedding tower, the index is the tower's own variable: there is no copy, a prediction sees the last training
    step, and the table is saved once. Of any other tower, the index is a weight that holds the tower's output for
    `candidates`; `refresh()` computes it anew after training.

    Args:
        retrieval: a `keras_rs.layers.BruteForceRetrieval` without candidates; its `k`, `return_scores` and name are
            kept.
        candidate_tower: a `keras.layers.Embedding`, or any layer or model that maps candidates to
            `[num_candidates, embedding_dim]`.
        candidates: the tower's inputs for the whole corpus: an array, or a nested structure of arrays with one row a
            candidate. Needed with a tower that is no embedding, and only there.
        candidate_ids: `[num_candidates]` ints, what is returned for each candidate; by default the number of its row.
        exclude_ids: ids of candidates that are never returned.
        similarity: `"dot"`, or `"cosine"` to L2-normalise both sides before scoring.
        mesh_axis: the axis of the mesh in force over which the rows of the index are split. `None` follows the table's
            own layout. Without a distribution the table stays whole.

    Returns:
        A `ShardedBruteForceRetrieval`.

    Raises:
        TypeError: if `retrieval` is no plain `BruteForceRetrieval`, the tower no layer, or ids are no integers.
        ValueError: if `retrieval` holds candidates, `k` is more than there are candidates, `candidates` are missing or
            not wanted, ids are out of range, or the mesh has no such axis.

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
    if _is_table(candidate_tower) and candidates is not None:
        raise ValueError(
            "The index of an embedding is its whole table, live, and takes no `candidates`. Received: "
            "both. Drop `candidates`; name the rows to leave out in `exclude_ids`."
        )
    if not _is_table(candidate_tower) and candidates is None:
        raise ValueError(
            "The index of a tower that is no plain `keras.layers.Embedding` needs the tower's inputs for the whole "
            f"corpus. Received: a {type(candidate_tower).__name__} and candidates=None. Pass `candidates`, "
            "for instance `candidates=np.arange(num_candidates)` where the tower takes row numbers."
        )
    distribution.check_mesh_axis(mesh_axis)
    return ShardedBruteForceRetrieval(
        candidate_tower,
        candidates=candidates,
        candidate_ids=candidate_ids,
        exclude_ids=exclude_ids,
        similarity=similarity,
        mesh_axis=mesh_axis,
        k=retrieval.k,
        return_scores=retrieval.return_scores,
        name=retrieval.name,
    )


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class ShardedBruteForceRetrieval(keras_rs.layers.BruteForceRetrieval):  # type: ignore[misc]
    """Exact top-k over the live table of a candidate tower, on one device or many. Made by `shard_candidates`.

    Called with query embeddings `[batch, embedding_dim]`, it returns `(scores, ids)`, both `[batch, k]`, float32 and
    int32, best first, equal scores by lower row; with `return_scores=False` the ids alone. A table that every device
    holds is scored by each for its own part of the batch, without traffic; of a table whose rows are split, the devices
    exchange their best k rows a query.

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
        k: int = 10,
        return_scores: bool = True,
        **kwargs: Any,
    ) -> None:
        k = _positive_int(k)
        losses.check_similarity(similarity)
        tied = _is_table(candidate_tower)
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
        self.supports_masking = True
        self._tied = tied
        self._keep(candidates)
        self._refreshed_embeddings: keras.Variable | None = None
        if self._tied:
            self._check_k(candidate_tower.input_dim)
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

    def update_candidates(self, candidate_embeddings: Any, candidate_ids: Any = None) -> None:
        """Replaces the embeddings of an index over a feature tower; an error on a tied index.

        Args:
            candidate_embeddings: `[num_candidates, embedding_dim]` float, of the shape that the index has.
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
        self._assign_table(candidate_embeddings, candidate_ids)

    def refresh(self, candidates: Any = None) -> None:
        """Runs the candidates through the tower again, for an index over a feature tower.

        A tied index is never stale, and stays as it is. If the tower fails, the old index stays whole.

        Args:
            candidates: the tower's inputs for the whole corpus, as many as before; `None` for those given last. They
                are not saved with the index: after loading, give them anew.

        Raises:
            ValueError: if there are no candidates, their number differs, or the tower's output is no finite
                `[num_candidates, embedding_dim]`.
        """
        if self._tied:
            return
        candidates = self._candidates if candidates is None else candidates
        if candidates is None:
            raise ValueError(
                "The index needs the tower's inputs for the whole corpus. Received: candidates=None, and none before: "
                "inputs are not saved with the index. Pass them: `refresh(candidates)`."
            )
        self._assign_table(self._embed(candidates), None)
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

    def call(self, query_embeddings: Any) -> Any:
        """Returns the candidates that score highest for each query.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.

        Returns:
            `(scores, ids)`, `[batch, k]` float32 and int32, best first, or the ids alone.

        Raises:
            ValueError: if the shape of the queries does not fit the table's.
        """
        table = self.candidate_embeddings
        self._check_queries(query_embeddings)
        self._check_k(table.shape[0])
        layout = distribution.table_layout(table)
        values = ops.convert_to_tensor(table)
        excluded = self._excluded_rows(table.shape[0])
        if layout is None:
            scores, rows = top_k.top_k(query_embeddings, values, self.k, self.similarity, excluded)
        else:
            queries = top_k.on_mesh(query_embeddings, layout)
            scores, rows = top_k.distributed_top_k(queries, values, self.k, layout, self.similarity, excluded)
        ids = rows if self.candidate_ids is None else ops.take(self.candidate_ids, rows, axis=0)
        if excluded is not None:
            # Where other candidates score -inf, too.
            ids = ops.where(ops.take(excluded, rows, axis=0), NO_CANDIDATE, ids)
        return (scores, ids) if self.return_scores else ids

    def compute_score(self, query_embedding: Any, candidate_embedding: Any) -> Any:
        """Returns the `[num_queries, num_candidates]` float32 scores by which the index ranks."""
        return top_k.scores(query_embedding, candidate_embedding, self.similarity)

    def compute_output_spec(self, query_embeddings: Any) -> Any:
        """Returns the shapes and dtypes of the result."""
        self._check_queries(query_embeddings)
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
            k=self.k,
            return_scores=self.return_scores,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ShardedBruteForceRetrieval:
        """Returns the index that `get_config` describes; `build_from_config` makes its weights."""
        config = dict(config)
        tower = keras.saving.deserialize_keras_object(config.pop("candidate_tower"))
        # Set apart: the ids of which they are come only with the weights.
        exclude_ids = config.pop("exclude_ids")
        index = cls(tower, **config)
        index.exclude_ids = exclude_ids
        return index

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns which weights the index has."""
        if not self._tied and self._refreshed_embeddings is None:
            return None
        return {
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
        self.build((None, None))

    def _keep(self, candidates: Any) -> None:
        # Past Keras's tracking of attributes, which would turn dicts into ones that a functional tower refuses.
        object.__setattr__(self, "_candidates", candidates)

    def _embed(self, candidates: Any) -> np.ndarray[Any, Any]:
        """Returns the tower's `[num_candidates, embedding_dim]` output for the candidates, computed in blocks."""
        num_candidates = _num_rows(candidates)
        blocks = []
        for start in range(0, num_candidates, REFRESH_BLOCK_SIZE):
            stop = min(start + REFRESH_BLOCK_SIZE, num_candidates)
            block = keras.tree.map_structure(lambda array, rows=slice(start, stop): array[rows], candidates)
            embeddings = ops.convert_to_numpy(self.candidate_tower(block, training=False)).astype("float32")
            if embeddings.ndim != 2 or embeddings.shape[0] != stop - start:
                raise ValueError(
                    "The candidate tower must map candidates to `[num_candidates, embedding_dim]`. Received: "
                    f"shape {embeddings.shape} for {stop - start} candidates. Flatten its output to one row each."
                )
            blocks.append(embeddings)
        return np.concatenate(blocks)

    def _assign_table(self, embeddings: Any, candidate_ids: Any) -> None:
        finite = np.isfinite(ops.convert_to_numpy(embeddings)).all(axis=1)
        if not finite.all():
            raise ValueError(
                "The embeddings of candidates must be finite. Received: NaN or infinity for candidate "
                f"{int(np.argmin(finite))}. Check the inputs of the tower: an id outside a table gives NaN."
            )
        if candidate_ids is not None:
            candidate_ids = check_corpus_ids(candidate_ids, embeddings.shape[0], self.exclude_ids)
        table = self._refreshed_embeddings
        if table is None:
            self._check_k(embeddings.shape[0])
            # The table first, as in `build_from_config`: a file knows weights by their order.
            self._add_table(embeddings.shape)
            if candidate_ids is not None:
                self._add_candidate_ids(embeddings.shape[0], candidate_ids)
        else:
            if tuple(table.shape) != tuple(embeddings.shape):
                raise ValueError(
                    "An index keeps its number of candidates and its dimension. Received: "
                    f"embeddings of shape {tuple(embeddings.shape)} for an index of shape {tuple(table.shape)}. "
                    "Make a new index with `shard_candidates`."
                )
            if candidate_ids is not None:
                if self.candidate_ids is None:
                    raise ValueError(
                        "An index without ids returns row numbers and keeps doing so. Received: `candidate_ids`. "
                        "Make a new index with `shard_candidates`."
                    )
                self.candidate_ids.assign(candidate_ids)
        self._refreshed_embeddings.assign(embeddings)  # type: ignore[union-attr]

    def _add_candidate_ids(self, num_candidates: int, candidate_ids: Any = None) -> None:
        self.candidate_ids = self.add_weight(
            shape=(num_candidates,), initializer="zeros", dtype="int32", trainable=False, name="candidate_ids"
        )
        if candidate_ids is not None:
            self.candidate_ids.assign(candidate_ids)

    def _add_table(self, shape: tuple[int, int]) -> None:
        self._refreshed_embeddings = self.add_weight(
            shape=shape, initializer="zeros", trainable=False, autocast=False, name="candidate_embeddings"
        )
        self._split_rows()

    def _split_rows(self) -> None:
        table = self.candidate_embeddings
        # With LoRA enabled, the table is a sum that the tower computes: there is no variable to lay out.
        if self.mesh_axis is not None and isinstance(table, keras.Variable):
            distribution.split_rows(table, self.mesh_axis)

    def _excluded_rows(self, num_candidates: int) -> Any:
        if not self.exclude_ids:
            return None
        ids = ops.arange(num_candidates, dtype="int32") if self.candidate_ids is None else self.candidate_ids
        return ops.isin(ids, ops.convert_to_tensor(self.exclude_ids, dtype="int32"))

    def _check_k(self, num_candidates: int) -> None:
        remaining = num_candidates - len(self.exclude_ids)
        if self.k > remaining:
            raise ValueError(
                "`k` must not be more than the number of candidates. Received: "
                f"k={self.k} for {num_candidates} candidates, {len(self.exclude_ids)} of them excluded. "
                f"Ask for at most {remaining}."
            )

    def _check_queries(self, query_embeddings: Any) -> None:
        dimension = self.candidate_embeddings.shape[1]
        shape = tuple(query_embeddings.shape)
        if len(shape) != 2 or shape[1] not in (None, dimension):
            raise ValueError(
                f"Query embeddings must have shape (batch, {dimension}), as the candidates' dimension is {dimension}. "
                f"Received: shape {shape}. Pass one row for each query, from a query tower of that dimension."
            )


def _positive_int(k: Any) -> int:
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1:
        raise ValueError(f"`k` must be a positive int. Received: k={k!r}. Ask for at least one candidate.")
    return int(k)


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


def _is_table(tower: keras.layers.Layer) -> bool:
    """Returns whether the tower's output is a row of its table and nothing more."""
    return isinstance(tower, keras.layers.Embedding) and type(tower).call is keras.layers.Embedding.call
