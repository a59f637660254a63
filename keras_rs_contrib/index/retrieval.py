"""The candidate index: `BruteForceRetrieval` tied to the candidate tower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import keras
import keras_rs
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import check_type, explains_keywords, positive_int
from keras_rs_contrib.ids import NO_CANDIDATE, IdArguments, check_exclude_ids, to_int32
from keras_rs_contrib.index import top_k
from keras_rs_contrib.index.candidate_rows import check_known, excluded_rows, side_by_side
from keras_rs_contrib.index.candidate_store import CandidateStore, check_candidates, check_k
from keras_rs_contrib.index.corpus import as_arrays, rows_of_names
from keras_rs_contrib.index.exchange import Exchange, on_mesh
from keras_rs_contrib.index.inclusion import Inclusion, Rows, check_only_one, check_shape, inclusion
from keras_rs_contrib.index.listed_candidates import top_k_of_listed
from keras_rs_contrib.index.ranks_of_ids import ranks_of_ids
from keras_rs_contrib.index.request import Request, cut, padded_call
from keras_rs_contrib.index.score_blocks import BLOCK_SIZE, Search, check_recall_target
from keras_rs_contrib.index.sizes import MIN_K, as_array, common_size
from keras_rs_contrib.scores import check_similarity, score_matrix
from keras_rs_contrib.tables.layout import table_layout
from keras_rs_contrib.vocabulary import Vocabulary

# Up to this many excluded candidates are found with the others and dropped, which costs a longer top-k. More are
# masked, which costs a pass over the scores.
MAX_DROPPED = 16


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class ShardedBruteForceRetrieval(IdArguments, CandidateStore, keras_rs.layers.BruteForceRetrieval):  # type: ignore[misc]
    """Exact top-k over the table of a candidate tower, on one device or many. Created by `shard_candidates`.

    Called with query embeddings `[batch, embedding_dim]`, it returns `(scores, ids)`, both `[batch, k]`, float32 and
    int32, best first, equal scores by lower row; with `return_scores=False` the ids alone. `exclude_ids` names
    candidates that are not returned for a query, `include_ids` the only ones that are. `ranks` returns the rank of a
    candidate in a query's whole list.

    If every device holds the table, each scores its own part of the batch, without traffic. If the rows are split, the
    devices exchange their best k rows for each query. Scores are computed in blocks, and sums are float32 for any
    dtype of the tower. A NaN score counts as -inf.

    The tower is a layer of the index: settings of the index, such as `trainable`, apply to the tower too. Within one
    `.keras` file the tower is saved once, and the loaded index shares it with the model again.
    `keras.models.clone_model` copies layer by layer, which gives the index its own tower: use `copy.deepcopy` instead.

    Args:
        candidate_tower: as in `shard_candidates`, like all arguments up to `recall_target`.
        candidates: as in `shard_candidates`.
        candidate_ids: as in `shard_candidates`.
        vocabularies: as in `shard_candidates`.
        exclude_ids: as in `shard_candidates`.
        similarity: as in `shard_candidates`.
        mesh_axis: as in `shard_candidates`.
        block_size: as in `shard_candidates`.
        recall_target: as in `shard_candidates`.
        k: as in `keras_rs.layers.BruteForceRetrieval`.
        return_scores: as in `keras_rs.layers.BruteForceRetrieval`.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    id_arguments = ("candidate_ids", "exclude_ids", "include_ids")

    def __new__(cls, *args: Any, **kwargs: Any) -> ShardedBruteForceRetrieval:
        """Checks that all arguments but the tower come by name. Keras reads the signature of the constructor itself."""
        if len(args) > 1:
            raise TypeError(
                "`ShardedBruteForceRetrieval` takes all arguments but the tower by name. Received: "
                f"{len(args)} arguments without a name, the last of type {type(args[-1]).__name__}. "
                "Create the index with `shard_candidates`."
            )
        index: ShardedBruteForceRetrieval = super().__new__(cls, *args, **kwargs)
        return index

    def __init__(
        self,
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
        k: int = 10,
        return_scores: bool = True,
        **kwargs: Any,
    ) -> None:
        check_type("candidate_tower", candidate_tower, keras.layers.Layer)
        k = positive_int(k, "k")
        block_size = None if block_size is None else positive_int(block_size, "block_size")
        check_recall_target(recall_target)
        check_similarity(similarity)
        excluded = check_exclude_ids(exclude_ids)
        candidates = as_arrays(candidates, vocabularies or {})
        candidate_ids = rows_of_names(candidate_ids, vocabularies or {})
        candidate_ids = check_candidates(candidate_tower, candidates, candidate_ids, excluded, k)
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
        self.take_vocabularies(vocabularies or {})
        self._hold(candidates, candidate_ids)

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
        check_k(self.k, self.num_candidates)
        if self._tied:
            self._split_rows()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the index, with query embeddings alone by position."""
        if len(args) > 1:
            raise TypeError(
                "An index takes query embeddings by position, and all other arguments by name. Received: "
                f"{len(args)} arguments without a name, the last of type {type(args[-1]).__name__}. "
                "Name excluded ids, `index(queries, exclude_ids=...)`; for another `k`, use `index.find(queries, k)`."
            )
        check_only_one(kwargs.get("include_ids"), None)
        arguments = {**kwargs, **({"query_embeddings": args[0]} if args else {})}
        arguments = {name: self.checked(name, value) for name, value in arguments.items()}
        result = super().__call__(**padded_call(arguments))
        num_queries = getattr(arguments.get("query_embeddings"), "shape", (None,))[0]
        return keras.tree.map_structure(lambda each: cut(each, (num_queries, self.k)), result)

    def call(self, query_embeddings: Any, *, exclude_ids: Any = None, include_ids: Any = None) -> Any:
        """Returns the candidates with the highest scores for each query.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            exclude_ids: `[batch, m]` int32, candidates that are not returned for the query, at the cost of a
                top-(k + m). -1, and ids that no candidate has, have no effect. `None` for none.
            include_ids: the only candidates to return, such as those in stock: `[m]` int32 for all queries, or
                `[batch, m]`, for each query. -1, duplicates, and ids that no candidate has, have no effect. The result
                is that of the whole corpus without all other candidates; the cost of a short list is that of its
                candidates. `None` for all candidates.

        Returns:
            `(scores, ids)`, `[batch, k]` float32 and int32, best first, or the ids alone. If fewer than k candidates
            remain, the rest are -inf and -1. A query with NaN has NaN scores and ids -1.

        Raises:
            ValueError: if the shape of the queries does not fit the table, or that of ids the queries.
        """
        scores, ids = self.find(query_embeddings, self.k, exclude_ids=exclude_ids, include_ids=include_ids)
        return (scores, ids) if self.return_scores else ids

    @explains_keywords
    def find(
        self,
        query_embeddings: Any,
        k: int,
        *,
        exclude_ids: Any = None,
        include_ids: Any = None,
        include_mask: Any = None,
    ) -> tuple[Any, Any]:
        """Returns the `k` candidates with the highest scores, independent of the `k` and `return_scores` of the index.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            k: positive int.
            exclude_ids: `[batch, m]` ints, as in a call.
            include_ids: `[m]` or `[batch, m]` ints, as in a call.
            include_mask: `[num_candidates]` bool for all queries, or `[batch, num_candidates]`, for each query: True
                for the rows of the index to return. An alternative to `include_ids`.

        Returns:
            `(scores, ids)`, `[batch, k]` float32 and int32, as in a call.

        Raises:
            TypeError: if ids are not integers, or a mask is not of bools.
            ValueError: as in a call, and if `k` exceeds the number of candidates.
        """
        if not self.built:
            self.build(query_embeddings.shape)
        if exclude_ids is not None:
            exclude_ids = to_int32(exclude_ids, "exclude_ids")
        self._check_queries(query_embeddings, exclude_ids)
        if not isinstance(query_embeddings, jax.core.Tracer):
            self.warn_if_stale()
        k = check_k(k, self.num_candidates)
        assert self.num_candidates is not None
        request = Request(
            query_embeddings, exclude_ids=exclude_ids, include_ids=include_ids, include_mask=include_mask
        ).padded(self.num_candidates)
        # The `k` of the index has a program of its own.
        num_found = min(common_size(k, MIN_K), self.num_candidates) if request.is_padded and k != self.k else k
        results = self._top_k(request, num_found)
        if request.is_padded:
            results = tuple(cut(result, (query_embeddings.shape[0], k)) for result in results)
        scores, ids = results
        return scores, ids

    def _top_k(self, request: Request, k: int) -> tuple[Any, Any]:
        search, limits = self._search(), self._inclusion(request)
        queries = on_mesh(request.queries, search.layout)
        table = ops.convert_to_tensor(self.candidate_embeddings)
        candidate_ids = _value_on_mesh(self.candidate_ids, search)
        if limits.listed_ids is not None:
            return top_k_of_listed(  # type: ignore[no-any-return]
                queries,
                table,
                on_mesh(limits.listed_ids, search.layout),
                k=k,
                search=search,
                candidate_ids=candidate_ids,
                id_lookup=_value_on_mesh(self.id_lookup, search),
                exclude_ids=on_mesh(request.exclude_ids, search.layout),
                own_exclude_ids=self._own_exclude_ids(),
            )
        # A mask that is needed anyway costs no more with the ids of the index.
        drops_own = limits.excluded is None and len(self.exclude_ids) <= MAX_DROPPED
        own = self._own_exclude_ids() if drops_own else None
        exclude_ids = side_by_side(ops.shape(queries)[0], request.exclude_ids, limits.dropped_ids, own)
        return top_k.top_k(  # type: ignore[no-any-return]
            queries,
            table,
            k=k,
            search=search,
            candidate_ids=candidate_ids,
            exclude_ids=on_mesh(exclude_ids, search.layout),
            excluded=None if drops_own else self._excluded_rows(limits),
            included=limits.included,
        )

    @explains_keywords
    def ranks(
        self,
        query_embeddings: Any,
        candidate_ids: Any,
        *,
        exclude_ids: Any = None,
        include_ids: Any = None,
        include_mask: Any = None,
    ) -> Any:
        """Returns the rank of candidates in each query's list of the whole corpus, without a top-k.

        The list is that of a call with `k` the number of candidates: the rank counts the candidates with a higher
        score, and those with the same score in a lower row.

        Args:
            query_embeddings: `[batch, embedding_dim]` float.
            candidate_ids: `[batch]` int, the candidate of each query, or `[batch, n]` for several; -1 for none.
            exclude_ids: `[batch, m]` int, candidates that are not in the query's list, as in a call.
            include_ids: `[m]` or `[batch, m]` int, the only candidates in the list, as in a call.
            include_mask: an alternative to `include_ids`, as in `find`.

        Returns:
            int32, shape of `candidate_ids`; 0 is best and -1 the rank of none. The rank is 2**31 - 1 if the candidate
            is not in the list, the query has NaN, or, while compiling, no candidate has the id.

        Raises:
            TypeError: if ids are not integers, or a mask is not of bools.
            ValueError: if shapes do not fit, or no candidate has an id.
        """
        query_embeddings = as_array(query_embeddings)
        if keras.backend.backend() != "jax":
            query_embeddings = ops.convert_to_tensor(query_embeddings)
        if not self.built:
            self.build(query_embeddings.shape)
        candidate_ids = to_int32(candidate_ids, "candidate_ids")
        if exclude_ids is not None:
            exclude_ids = to_int32(exclude_ids, "exclude_ids")
        self._check_queries(query_embeddings, exclude_ids)
        if not isinstance(query_embeddings, jax.core.Tracer):
            self.warn_if_stale()
        shape = tuple(candidate_ids.shape)
        if len(shape) not in (1, 2) or shape[0] != query_embeddings.shape[0]:
            raise ValueError(
                "`candidate_ids` needs one id for each query, or a row of them. Received: "
                f"shape {shape} for {query_embeddings.shape[0]} queries. Pass a flat list, or rows filled with "
                f"{NO_CANDIDATE}."
            )
        num_candidates = self.num_candidates
        assert num_candidates is not None
        ids = candidate_ids if len(shape) == 2 else candidate_ids[:, None]
        request = Request(query_embeddings, ids, exclude_ids, include_ids, include_mask).padded(num_candidates)
        result = self._ranks(request)
        if request.is_padded:
            return cut(result, shape)
        return result if len(shape) == 2 else result[:, 0]

    def _ranks(self, request: Request) -> Any:
        search, limits = self._search(), self._inclusion(request)
        ids = request.candidate_ids
        exclude_ids = side_by_side(ids.shape[0], request.exclude_ids, limits.dropped_ids)
        is_listed = limits.listed_ids is not None
        result, is_unknown = ranks_of_ids(
            on_mesh(request.queries, search.layout),
            ops.convert_to_tensor(self.candidate_embeddings),
            on_mesh(ids, search.layout),
            search=search,
            id_lookup=_value_on_mesh(self.id_lookup, search),
            exclude_ids=on_mesh(exclude_ids, search.layout),
            excluded=None if is_listed else self._excluded_rows(limits),
            included=limits.included,
            listed_ids=on_mesh(limits.listed_ids, search.layout),
            own_exclude_ids=self._own_exclude_ids() if is_listed else None,
        )
        check_known(ids, is_unknown, search.num_candidates)
        return result

    def compute_score(self, query_embedding: Any, candidate_embedding: Any) -> Any:
        """Returns the `[num_queries, num_candidates]` float32 scores by which the index ranks."""
        return score_matrix(query_embedding, candidate_embedding, self.similarity)

    def compute_output_spec(self, query_embeddings: Any, *, exclude_ids: Any = None, include_ids: Any = None) -> Any:
        """Returns the shapes and dtypes of the result."""
        self._check_queries(query_embeddings, exclude_ids)
        if include_ids is not None:
            check_shape("include_ids", include_ids, query_embeddings.shape[0])
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

    def _search(self) -> Search:
        assert self.num_candidates is not None
        return Search(
            num_candidates=self.num_candidates,
            similarity=self.similarity,
            block_size=self.block_size or BLOCK_SIZE,
            recall_target=self.recall_target,
            layout=table_layout(self.candidate_embeddings),
        )

    def _inclusion(self, request: Request) -> Inclusion:
        layout, table = table_layout(self.candidate_embeddings), self.candidate_embeddings
        assert self.num_candidates is not None
        rows = Rows(
            num_candidates=self.num_candidates,
            num_rows=table.shape[0],
            num_shards=Exchange(layout).num_shards,
            candidate_ids=self.candidate_ids,
            id_lookup=self.id_lookup,
            max_dropped=max(0, MAX_DROPPED - len(self.exclude_ids)),
        )
        return inclusion(request.include_ids, request.include_mask, request.queries.shape[0], rows)

    def _excluded_rows(self, limits: Inclusion) -> Any:
        """Returns the mask of the rows that no query finds, `[num_rows]` bool, or `None` if there are none."""
        if not self.exclude_ids:
            return limits.excluded
        num_candidates, num_rows = self.num_candidates, self.candidate_embeddings.shape[0]
        assert num_candidates is not None
        excluded = excluded_rows(self.exclude_ids, self.candidate_ids, num_candidates, num_rows)
        return excluded if limits.excluded is None else ops.logical_or(excluded, limits.excluded)

    def _own_exclude_ids(self) -> np.ndarray[Any, np.dtype[np.int32]] | None:
        return np.array(self.exclude_ids, "int32") if self.exclude_ids else None

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


def _value_on_mesh(variable: keras.Variable | None, search: Search) -> Any:
    return None if variable is None else on_mesh(variable.value, search.layout)
