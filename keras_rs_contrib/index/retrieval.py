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

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.ids import NO_CANDIDATE, IdArguments, check_corpus_ids, check_exclude_ids, to_int32
from keras_rs_contrib.index import corpus, top_k
from keras_rs_contrib.index.candidate_rows import excluded_rows, rows_of_ids
from keras_rs_contrib.index.exchange import on_mesh
from keras_rs_contrib.index.ranks import ranks
from keras_rs_contrib.index.score_blocks import BLOCK_SIZE, Search
from keras_rs_contrib.scores import check_similarity, score_matrix
from keras_rs_contrib.tables import layout
from keras_rs_contrib.tables.padding import UnpaddedStore, add_table, pad_rows, padded_rows
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding
from keras_rs_contrib.tables.sharded_embedding import ShardedEmbedding

# Up to this many excluded candidates are found with the others and dropped, which costs a longer top-k; more are masked,
# which costs a pass over the scores.
MAX_DROPPED = 16


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class ShardedBruteForceRetrieval(IdArguments, keras_rs.layers.BruteForceRetrieval):  # type: ignore[misc]
    """Exact top-k over the table of a candidate tower, on one device or many. Created by `shard_candidates`.

    Called with query embeddings `[batch, embedding_dim]`, it returns `(scores, ids)`, both `[batch, k]`, float32 and
    int32, best first, equal scores by lower row; with `return_scores=False` the ids alone. `exclude_ids` names
    candidates that are not returned for a query. `ranks` returns the rank of a candidate in a query's whole list.

    If every device holds the table, each scores its own part of the batch, without traffic. If the rows are split, the
    devices exchange their best k rows for each query. Scores are computed in blocks, and sums are float32 whatever the
    dtype of the tower. A NaN score counts as -inf.

    The tower is a layer of the index: settings of the index, such as `trainable`, apply to the tower too. Within one
    `.keras` file the tower is saved once, and the loaded index shares it with the model again.
    `keras.models.clone_model` copies layer by layer, which gives the index its own tower: use `copy.deepcopy` instead.

    Args:
        candidate_tower: the tower, as in `shard_candidates`, which describes the arguments that follow.
        candidates: the tower's inputs for the whole corpus.
        candidate_ids: `[num_candidates]` ints.
        exclude_ids: ids that are never returned.
        similarity: `"dot"` or `"cosine"`.
        mesh_axis: the mesh axis over which the rows are split.
        block_size: the number of scores that each device computes at once.
        recall_target: the share of the exact top-k that is enough on a TPU.
        k: the number of candidates to return.
        return_scores: whether to return the scores with the ids.
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
        check_similarity(similarity)
        tied = is_table(candidate_tower)
        excluded = check_exclude_ids(exclude_ids)
        if tied or candidates is not None:
            num_candidates = candidate_tower.input_dim if tied else corpus.num_rows(candidates)
            candidate_ids = check_corpus_ids(candidate_ids, num_candidates, excluded)
        # A mixed precision policy would copy the table at each call, rounded.
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
        # Of a feature tower: its output for the corpus, padded, and how many rows of it are candidates.
        self._refreshed_embeddings: keras.Variable | None = None
        self._num_refreshed = 0
        if tied or candidates is not None:
            self._check_k(num_candidates, len(excluded))
        if self._tied:
            if candidate_ids is not None:
                self._add_candidate_ids(candidate_tower.input_dim, candidate_ids)
            if candidate_tower.built:
                self._split_rows()
        elif candidates is not None:
            self._assign_corpus(corpus.embed(candidate_tower, candidates), candidate_ids)
            self.tower_checksum.assign(self._current_checksum())

    def __setattr__(self, name: str, value: Any) -> None:
        # The base class clears the attribute in its constructor.
        if name == "candidate_embeddings" and value is not None:
            raise AttributeError(
                "`candidate_embeddings` belongs to the candidate tower of the index. Received: an assignment. "
                "Drop it: `shard_candidates` has tied the two, and no build or update is needed."
            )
        super().__setattr__(name, value)

    @property
    def candidate_embeddings(self) -> Any:
        """The table that is searched, or `None` if it is not built yet.

        Its first `num_candidates` rows are the candidates; the others are padding.
        """
        if not self._tied:
            return self._refreshed_embeddings
        if getattr(self.candidate_tower, "quantization_mode", None) is not None:
            raise ValueError(
                "The index searches the floating-point table of its tower. Received: "
                f"a tower quantized to {self.candidate_tower.quantization_mode}. Keep the candidate tower unquantized."
            )
        return self.candidate_tower.embeddings if self.candidate_tower.built else None

    @candidate_embeddings.setter
    def candidate_embeddings(self, value: None) -> None:
        pass

    @property
    def is_tied(self) -> bool:
        """Whether the index is the table of its tower, and not a copy of the tower's output."""
        return self._tied

    @property
    def num_candidates(self) -> int | None:
        """The number of candidates, or `None` before the first refresh."""
        if self._tied:
            return int(self.candidate_tower.input_dim)
        return None if self._refreshed_embeddings is None else self._num_refreshed

    @property
    def has_candidates(self) -> bool:
        """Whether the index of a feature tower has the tower's inputs, which are not saved with it."""
        return self._candidates is not None

    # The corpus of a feature tower.

    def update_candidates(self, candidate_embeddings: Any, candidate_ids: Any = None) -> None:
        """Replaces the embeddings of an index over a feature tower; an error on a tied index.

        Args:
            candidate_embeddings: `[num_candidates, embedding_dim]` float, of the dimension of the index.
            candidate_ids: `[num_candidates]` ints, or `None` to keep the current ones.

        Raises:
            ValueError: if the index is tied to an embedding, or shapes or ids do not fit.
        """
        if self._tied:
            raise ValueError(
                "`update_candidates` would overwrite the trained table of the candidate tower, which is the index. "
                f"Received: new embeddings for an index tied to {self.candidate_tower.name!r}. Train the tower, or "
                "assign to its `embeddings`; for a table of other candidates create a new index."
            )
        shape = None if candidate_embeddings is None else np.shape(candidate_embeddings)
        if shape is None or len(shape) != 2:
            raise ValueError(
                "`candidate_embeddings` must be of rank 2, (num_candidates, embedding_dim). "
                f"Received: shape {shape}. Pass one row for each candidate."
            )
        self._assign_corpus(candidate_embeddings, self._check_corpus(shape[0], candidate_ids))

    def refresh(self, candidates: Any = None, candidate_ids: Any = None, verbose: int | str = "auto") -> None:
        """Runs the candidates through the tower again, for an index over a feature tower.

        A tied index is never stale, and does not change. If the tower fails, the old index remains.

        Args:
            candidates: the tower's inputs for the whole corpus, which may have grown or shrunk; `None` for the previous
                ones. They are not saved with the index: pass them again after loading.
            candidate_ids: `[num_candidates]` ints, the ids of `candidates`; `None` to keep the current ones.
                `exclude_ids` that are no longer among them have no effect.
            verbose: 1 for a progress bar, 0 for none, `"auto"` for one if the corpus is large.

        Raises:
            TypeError: if candidates are not arrays, or ids not integers.
            ValueError: if there are no candidates, fewer than `k`, their number differs from that of their ids, or the
                tower's output is not a finite `[num_candidates, embedding_dim]`.
        """
        if self._tied:
            if candidates is not None or candidate_ids is not None:
                raise ValueError(
                    "The index of an embedding is its whole table and takes no `candidates`. Received: "
                    f"new ones for an index tied to {self.candidate_tower.name!r}. Create a new index."
                )
            return
        candidates = self._candidates if candidates is None else candidates
        if candidates is None:
            raise ValueError(
                "The index needs the tower's inputs for the whole corpus. Received: candidates=None, and none before: "
                "inputs are not saved with the index. Pass them: `refresh(candidates)`."
            )
        # Before the tower runs, which may take long.
        candidate_ids = self._check_corpus(corpus.num_rows(candidates), candidate_ids)
        self._assign_corpus(corpus.embed(self.candidate_tower, candidates, verbose), candidate_ids)
        self._keep(candidates)
        self.tower_checksum.assign(self._current_checksum())

    def refresh_if_stale(self, verbose: int | str = "auto") -> None:
        """Refreshes an index over a feature tower if the tower's weights have changed since the last refresh.

        Args:
            verbose: as in `refresh`.

        Raises:
            ValueError: if the index is stale and, after loading, has no candidates to refresh it with.
        """
        if self._tied or self._refreshed_embeddings is None:
            return
        current, known = self._current_checksum(), ops.convert_to_numpy(self.tower_checksum)
        if np.array_equal(known, current):
            return
        if self.has_candidates:
            self.refresh(verbose=verbose)
        elif known.any():
            raise ValueError(
                "The candidate tower has changed since the last refresh of the index, and the index does not have the "
                "tower's inputs, which are not saved with it. Received: a stale index. "
                "Pass them: `model.retrieval.refresh(candidates)`."
            )
        else:
            self.tower_checksum.assign(current)

    def check_can_refresh(self) -> None:
        """Raises `ValueError` if training would make the index stale with no way to refresh it."""
        if not self._tied and not self.has_candidates:
            raise ValueError(
                "To validate while the candidate tower is trained, the index needs the tower's inputs for the whole "
                "corpus. Received: a model whose index has none: they are not saved with it. "
                "Pass them first: `model.retrieval.refresh(candidates)`."
            )

    # Search.

    def build(self, input_shape: Any) -> None:
        """Builds a candidate tower that is an embedding, and lays out its table."""
        if self._tied and not self.candidate_tower.built:
            # In the scope around the index: a layout map, and a loaded file, know the table by the path that it has
            # without the index.
            grandparent, _, parent = self.path.rpartition("/")[0].rpartition("/")
            with keras.name_scope(parent, override_parent=grandparent):
                self.candidate_tower.build((None,))
        if self.candidate_embeddings is None:
            raise ValueError(
                "The index has no candidates yet. Received: a call before `refresh`. "
                "Run the corpus through the tower first: `refresh(candidates)`."
            )
        self._check_k(self.num_candidates)
        if self._tied:
            self._split_rows()

    def call(self, query_embeddings: Any, exclude_ids: Any = None) -> Any:
        """Returns the candidates with the highest scores for each query.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            exclude_ids: `[batch, m]` int32, candidates that are not returned for the query, at the cost of a
                top-(k + m). -1, and ids that no candidate has, have no effect. `None` for none.

        Returns:
            `(scores, ids)`, `[batch, k]` float32 and int32, best first, or the ids alone. If fewer than k candidates
            remain, the rest are -inf and -1. A query with NaN has NaN scores and ids -1.

        Raises:
            ValueError: if the shape of the queries does not fit the table, or that of `exclude_ids` the queries.
        """
        scores, ids = self.find(query_embeddings, self.k, exclude_ids)
        return (scores, ids) if self.return_scores else ids

    def find(self, query_embeddings: Any, k: int, exclude_ids: Any = None) -> tuple[Any, Any]:
        """Returns the `k` candidates with the highest scores, whatever `k` and `return_scores` of the index.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            k: positive int.
            exclude_ids: `[batch, m]` int32, as in a call.

        Returns:
            `(scores, ids)`, `[batch, k]` float32 and int32, as in a call.

        Raises:
            ValueError: as in a call, and if `k` exceeds the number of candidates.
        """
        if not self.built:
            self.build(query_embeddings.shape)
        self._check_queries(query_embeddings, exclude_ids)
        self._check_k(self.num_candidates, k=k)
        search = self._search()
        excluded = None
        if len(self.exclude_ids) > MAX_DROPPED:
            excluded = self._excluded_rows()
        elif self.exclude_ids:
            exclude_ids = self._with_own_exclude_ids(exclude_ids, ops.shape(query_embeddings)[0])
        candidate_ids = None if self.candidate_ids is None else self.candidate_ids.value
        scores, ids = top_k.top_k(
            on_mesh(query_embeddings, search.layout),
            ops.convert_to_tensor(self.candidate_embeddings),
            k=k,
            search=search,
            candidate_ids=on_mesh(candidate_ids, search.layout),
            exclude_ids=on_mesh(exclude_ids, search.layout),
            excluded=excluded,
        )
        return scores, ids

    def ranks(self, query_embeddings: Any, candidate_ids: Any, exclude_ids: Any = None) -> Any:
        """Returns the rank of candidates in each query's list of the whole corpus, without a top-k.

        The list is that of a call with `k` the number of candidates: the rank counts the candidates with a higher
        score, and those with the same score in a lower row.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            candidate_ids: `[batch]` int, the candidate of each query, or `[batch, n]` for several; -1 for none.
            exclude_ids: `[batch, m]` int, candidates that are not in the query's list, as in a call.

        Returns:
            int32, shape of `candidate_ids`; 0 is best and -1 the rank of none. The rank is the number of candidates if
            the candidate is excluded, the query has NaN, or, while compiling, no candidate has the id.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if shapes do not fit, or no candidate has an id.
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
        # All ids at once: looking them up sorts the corpus.
        ids = candidate_ids if len(shape) == 2 else ops.expand_dims(candidate_ids, 1)
        all_ids = ids if exclude_ids is None else ops.concatenate([ids, exclude_ids], axis=1)
        all_rows = rows_of_ids(all_ids, self.candidate_ids, num_candidates)
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
        result = ranks(
            on_mesh(query_embeddings, search.layout),
            ops.convert_to_tensor(self.candidate_embeddings),
            on_mesh(rows, search.layout),
            search=search,
            exclude_rows=on_mesh(exclude_rows, search.layout),
            excluded=excluded,
        )
        result = ops.where(on_mesh(unlisted, search.layout), num_candidates, result)
        result = ops.where(on_mesh(is_none, search.layout), NO_CANDIDATE, result)
        return ops.reshape(result, shape)

    def compute_score(self, query_embedding: Any, candidate_embedding: Any) -> Any:
        """Returns the `[num_queries, num_candidates]` float32 scores by which the index ranks."""
        return score_matrix(query_embedding, candidate_embedding, self.similarity)

    def compute_output_spec(self, query_embeddings: Any, exclude_ids: Any = None) -> Any:
        """Returns the shapes and dtypes of the result."""
        self._check_queries(query_embeddings, exclude_ids)
        shape = (query_embeddings.shape[0], self.k)
        ids = keras.KerasTensor(shape, dtype="int32")
        return (keras.KerasTensor(shape, dtype="float32"), ids) if self.return_scores else ids

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: a list of candidates has no mask."""
        return

    # Saving.

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized, without candidates and their ids, which are weights."""
        config: dict[str, Any] = super().get_config()
        # Twice, so that the second result is marked as shared: Keras marks an object in a file from its second
        # occurrence on, and marks the first one later, in a dict that has been copied by then.
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
        """Returns the index that `get_config` describes; `build_from_config` creates its weights."""
        config = dict(config)
        tower = config.pop("candidate_tower")
        if not isinstance(tower, keras.layers.Layer):
            tower = keras.saving.deserialize_keras_object(tower)
        # Assigned afterwards: the candidate ids that they must be among come with the weights.
        exclude_ids = config.pop("exclude_ids")
        index = cls(tower, **config)
        index.exclude_ids = exclude_ids
        return index

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns which weights the index has."""
        table = self.candidate_embeddings
        if table is None and self.candidate_ids is None:
            return None
        return {
            "has_table": table is not None,
            "table_shape": None if self._tied else [self.num_candidates, int(table.shape[1])],
            "has_candidate_ids": self.candidate_ids is not None,
        }

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Creates the weights that `get_build_config` names, for the file's values to be loaded into."""
        if not config:
            return
        if config["table_shape"] is not None:
            self._add_corpus(tuple(config["table_shape"]))
            num_candidates = config["table_shape"][0]
        else:
            num_candidates = self.candidate_tower.input_dim
        if config["has_candidate_ids"]:
            self._add_candidate_ids(num_candidates)
        if config["has_table"]:
            self.build((None, None))

    def save_own_variables(self, store: Any) -> None:
        """Saves the corpus of a feature tower without padding rows, the ids, and the checksum."""
        for number, variable in enumerate(self._own_variables()):
            unpadded = self._unpadded(store) if variable is self._refreshed_embeddings else store
            unpadded[str(number)] = variable

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` has saved. Files of version 0.1 have no checksum in the index."""
        variables = self._own_variables()
        num_saved = len(store.keys())
        if num_saved not in (len(variables), len(variables) - (not self._tied)):
            raise ValueError(
                f"The saved weights of an index must be its own. Received: {num_saved} weights for {self.name!r}, which "
                f"has {len(variables)}. Create the index with the arguments that were saved."
            )
        for number, variable in enumerate(variables[:num_saved]):
            unpadded = self._unpadded(store) if variable is self._refreshed_embeddings else store
            variable.assign(unpadded[str(number)])

    def _own_variables(self) -> list[keras.Variable]:
        checksum = [] if self._refreshed_embeddings is None else [self.tower_checksum]
        own = [self._refreshed_embeddings, self.candidate_ids, *checksum]
        return [variable for variable in own if variable is not None]

    def _unpadded(self, store: Any) -> UnpaddedStore:
        table = self._refreshed_embeddings
        return UnpaddedStore(store, self._num_refreshed, table.shape[0], self.name)  # type: ignore[union-attr]

    def _keep(self, candidates: Any) -> None:
        # Hidden from Keras's attribute tracking, which would turn dicts into ones that a functional tower rejects.
        object.__setattr__(self, "_candidates", candidates)

    def _current_checksum(self) -> np.ndarray[Any, Any]:
        # Without the state of random generators, which inference does not use.
        return corpus.checksum(self.candidate_tower.weights)

    def _check_corpus(self, num_candidates: int, candidate_ids: Any) -> Any:
        """Returns the ids of new candidates as int32, or `None` to keep the current ones, or raises."""
        has_table = self._refreshed_embeddings is not None
        if not has_table:
            candidate_ids = check_corpus_ids(candidate_ids, num_candidates, self.exclude_ids)
        elif candidate_ids is not None:
            candidate_ids = check_corpus_ids(candidate_ids, num_candidates, [])
            if self.candidate_ids is None:
                raise ValueError(
                    "An index without ids returns row numbers and continues to do so. Received: `candidate_ids`. "
                    "Create a new index with `shard_candidates`."
                )
        changes = has_table and num_candidates != self.num_candidates
        if changes and keras.backend.backend() != "jax":
            raise NotImplementedError(
                "Changing the number of candidates of an index needs the JAX backend. Received: "
                f"{num_candidates} candidates on {keras.backend.backend()!r}. "
                "Create a new index with `shard_candidates`, or set KERAS_BACKEND=jax."
            )
        if changes and candidate_ids is None and self.candidate_ids is not None:
            raise ValueError(
                "An index with ids needs the ids of the new candidates if their number changes. Received: "
                f"candidate_ids=None for {num_candidates} candidates instead of {self.candidate_ids.shape[0]}. "
                "Pass `candidate_ids`."
            )
        present = candidate_ids if candidate_ids is not None else self.candidate_ids
        if present is None:
            present = np.arange(num_candidates)
        self._check_k(num_candidates, int(np.isin(self.exclude_ids, ops.convert_to_numpy(present)).sum()))
        return candidate_ids

    def _assign_corpus(self, embeddings: Any, candidate_ids: Any) -> None:
        """Assigns embeddings, which are checked here, and ids, which have been checked."""
        corpus.check_finite(embeddings)
        num_candidates, dimension = embeddings.shape
        if self._refreshed_embeddings is None:
            self._add_corpus((num_candidates, dimension))
            if candidate_ids is not None:
                self._add_candidate_ids(num_candidates, candidate_ids)
        table = self._refreshed_embeddings
        assert table is not None
        if table.shape[1] != dimension:
            raise ValueError(
                "An index keeps its dimension. Received: "
                f"embeddings of shape {tuple(embeddings.shape)} for an index of dimension {table.shape[1]}. "
                "Create a new index with `shard_candidates`."
            )
        # Everything that can fail comes before the first assignment.
        embeddings = pad_rows(embeddings, padded_rows(num_candidates, self._row_multiple()))
        if candidate_ids is not None:
            _replace(self.candidate_ids, candidate_ids)
        _replace(table, embeddings)
        self._num_refreshed = num_candidates

    def _row_multiple(self) -> int:
        # A corpus has no optimizer slots, and is saved without padding: the least that the mesh in force needs.
        return layout.axis_size(layout.axis_of_rows(self.mesh_axis, f"{self.path or self.name}/candidate_embeddings"))

    def _add_corpus(self, shape: tuple[int, int]) -> None:
        name = "candidate_embeddings"
        self._refreshed_embeddings = add_table(
            self, name, shape, "zeros", self._row_multiple(), self.mesh_axis, trainable=False, autocast=False
        )
        self._num_refreshed = shape[0]
        # Of the tower's weights at the last refresh; zeros if unknown.
        self.tower_checksum = self.add_weight(
            shape=(2,), initializer="zeros", dtype="int32", trainable=False, autocast=False, name="tower_checksum"
        )

    def _add_candidate_ids(self, num_candidates: int, candidate_ids: Any = None) -> None:
        self.candidate_ids = self.add_weight(
            shape=(num_candidates,), initializer="zeros", dtype="int32", trainable=False, name="candidate_ids"
        )
        if candidate_ids is not None:
            self.candidate_ids.assign(candidate_ids)

    def _split_rows(self) -> None:
        table = self.candidate_embeddings
        # With LoRA enabled, the table is a sum that the tower computes: there is no variable to lay out.
        if self.mesh_axis is not None and isinstance(table, keras.Variable):
            # With the slots of a row-sparse table.
            for variable in (table, *getattr(table, "slots", ())):
                layout.split_rows(variable, self.mesh_axis)

    def _search(self) -> Search:
        assert self.num_candidates is not None
        return Search(
            num_candidates=self.num_candidates,
            similarity=self.similarity,
            block_size=self.block_size or BLOCK_SIZE,
            recall_target=self.recall_target,
            layout=layout.table_layout(self.candidate_embeddings),
        )

    def _with_own_exclude_ids(self, exclude_ids: Any, num_queries: Any) -> Any:
        own = ops.convert_to_tensor(self.exclude_ids, dtype="int32")
        own = ops.broadcast_to(ops.expand_dims(own, 0), (num_queries, len(self.exclude_ids)))
        return own if exclude_ids is None else ops.concatenate([exclude_ids, own], axis=1)

    def _excluded_rows(self) -> Any:
        num_candidates, num_rows = self.num_candidates, self.candidate_embeddings.shape[0]
        assert num_candidates is not None
        return excluded_rows(self.exclude_ids, self.candidate_ids, num_candidates, num_rows)

    def _check_k(self, num_candidates: int | None, num_excluded: int = 0, k: int | None = None) -> None:
        assert num_candidates is not None
        remaining = num_candidates - num_excluded
        k = positive_int(self.k if k is None else k, "k")
        if k > remaining:
            raise ValueError(
                "`k` must not exceed the number of candidates. Received: "
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


def is_table(tower: keras.layers.Layer) -> bool:
    """Returns whether the tower's output is a row of its table and nothing more."""
    calls = (keras.layers.Embedding.call, ShardedEmbedding.call, RowSparseEmbedding.call)
    return isinstance(tower, keras.layers.Embedding) and type(tower).call in calls


def _replace(variable: keras.Variable, value: np.ndarray[Any, Any]) -> None:
    """Assigns a value that may have another number of rows than before."""
    if tuple(value.shape) != tuple(variable.shape):
        # Whatever can fail, fails before the variable changes.
        value = ops.convert_to_tensor(value, dtype=variable.dtype)
        _keras.set_shape(variable, tuple(value.shape))
    variable.assign(value)


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
    """Raises `ValueError` if no candidate has one of the ids, unless they are traced."""
    if isinstance(rows, jax.core.Tracer):
        return
    unknown = ops.convert_to_numpy(ops.logical_and(ops.equal(rows, num_candidates), ops.logical_not(is_none)))
    if unknown.any():
        row, column = np.argwhere(unknown)[0]
        raise ValueError(
            "`candidate_ids` must be ids of candidates. Received: "
            f"{int(ops.convert_to_numpy(candidate_ids)[row, column])} in row {row}, which is none of the "
            f"{num_candidates}. Pass {NO_CANDIDATE} for none."
        )
