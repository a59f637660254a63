"""The candidates of an index: the table of its tower, or the embeddings of a corpus, and their ids."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import explains_keywords, on_host, positive_int
from keras_rs_contrib.distribution import axis_size
from keras_rs_contrib.ids import check_corpus_ids
from keras_rs_contrib.index import corpus
from keras_rs_contrib.index.staleness import Staleness, stale_index
from keras_rs_contrib.tables import layout
from keras_rs_contrib.tables.padding import UnpaddedStore, add_table, pad_rows, padded_rows
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding
from keras_rs_contrib.tables.sharded_embedding import ShardedEmbedding


class CandidateStore(Staleness):
    """The part of an index that holds, refreshes and saves its candidates.

    The candidates of an embedding tower are the tower's own table. Those of a feature tower are a weight with the
    tower's output for the corpus, and a checksum of the tower's weights that tells when it is stale.

    Attributes:
        candidate_ids: `[num_candidates]` int32 variable, or `None` if row numbers are the ids.
        id_lookup: `[2, num_candidates]` int32 variable, the ids in ascending order and their rows, or `None`. Derived
            from `candidate_ids`, and not saved: sorting a large corpus in each call would cost more than a search.
        exclude_ids: ids that are never returned, sorted.
        mesh_axis: the mesh axis over which the rows are split, or `None`.
        k: the number of candidates to return.
    """

    candidate_ids: keras.Variable | None
    id_lookup: keras.Variable | None = None
    exclude_ids: list[int]
    mesh_axis: str | None
    k: int
    _id_feature: str | None = None

    def _hold(self, candidates: Any, candidate_ids: Any) -> None:
        """Takes the candidates of the tower, in the constructor of the index; `check_candidates` has checked them."""
        self._tied = is_table(self.candidate_tower)
        self._keep(candidates)
        # Of a feature tower: its output for the corpus, padded, and how many rows of it are candidates.
        self._refreshed_embeddings: keras.Variable | None = None
        self._num_refreshed = 0
        if self._tied:
            if candidate_ids is not None:
                self._add_candidate_ids(self.candidate_tower.input_dim, candidate_ids)
            if self.candidate_tower.built:
                self._split_rows()
        elif candidates is not None:
            self._embed_corpus(candidates, candidate_ids)

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

    def take_ids_from(self, feature: str) -> None:
        """Takes the ids of candidates from one of their features, now and in each `refresh` without `candidate_ids`.

        Args:
            feature: a key of `candidates`. If they do not have it, nothing changes.

        Raises:
            TypeError: if the feature does not hold integers.
            ValueError: if the values are not ids of the candidates, or contradict the ids of the index.
        """
        self._id_feature = feature
        values = self._ids_among(self._candidates)
        if values is None:
            return
        num_candidates = corpus.num_rows(self._candidates)
        candidate_ids = check_corpus_ids(values, num_candidates, self.exclude_ids)
        assert candidate_ids is not None
        if self.candidate_ids is None and not np.array_equal(candidate_ids, np.arange(num_candidates)):
            if self.built:
                raise ValueError(
                    "An index without ids returns row numbers and continues to do so. Received: a built index, whose "
                    f"candidates have ids of their own in {feature!r}. Pass them to `shard_candidates` as "
                    "`candidate_ids`."
                )
            self._add_candidate_ids(num_candidates, candidate_ids)
        elif self.candidate_ids is not None and not np.array_equal(candidate_ids, np.asarray(self.candidate_ids)):
            raise ValueError(
                f"The ids of an index must be those of the feature {feature!r} of its candidates. Received: other "
                "`candidate_ids`. Drop `candidate_ids`, or pass the name of the feature that holds them to the model."
            )

    def _ids_among(self, candidates: Any) -> Any:
        """Returns the ids that candidates hold as a feature, `[num_candidates]`, or `None`."""
        if self._id_feature is None or not isinstance(candidates, dict) or self._id_feature not in candidates:
            return None
        ids = np.asarray(candidates[self._id_feature])
        return ids[:, 0] if ids.ndim == 2 and ids.shape[1] == 1 else ids

    def update_candidates(self, candidate_embeddings: Any, candidate_ids: Any = None) -> None:
        """Replaces the embeddings of an index over a feature tower; an error on a tied index.

        The index counts as current until the tower changes.

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
        if self.candidate_tower.built:
            self._note_tower()

    @explains_keywords
    def refresh(self, candidates: Any = None, candidate_ids: Any = None, *, verbose: int | str = "auto") -> None:
        """Runs the candidates through the tower again, for an index over a feature tower.

        A tied index is never stale, and does not change. If the tower fails, the old index remains.

        Args:
            candidates: the tower's inputs for the whole corpus, which may have grown or shrunk; `None` for the previous
                ones. They are not saved with the index: pass them again after loading. Features with a vocabulary hold
                names.
            candidate_ids: `[num_candidates]` ints or names, the ids of `candidates`; `None` to keep the current ones.
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
        candidates = self._candidates if candidates is None else self._as_arrays(candidates)
        if candidates is None:
            raise ValueError(
                "The index needs the tower's inputs for the whole corpus. Received: candidates=None, and none before: "
                "inputs are not saved with the index. Pass them: `refresh(candidates)`."
            )
        if candidate_ids is not None and self._id_feature in self._vocabularies:
            candidate_ids = self._vocabularies[self._id_feature].encode(candidate_ids, unknown="error")
        if candidate_ids is None:
            candidate_ids = self._ids_among(candidates)
            if self.candidate_ids is None and np.array_equal(candidate_ids, np.arange(corpus.num_rows(candidates))):
                candidate_ids = None
        # Before the tower runs, which may take long.
        candidate_ids = self._check_corpus(corpus.num_rows(candidates), candidate_ids)
        self._embed_corpus(candidates, candidate_ids, verbose)
        self._keep(candidates)

    def take_corpus(self, other: CandidateStore) -> None:
        """Copies the candidates of another index over a feature tower, and whether they are stale."""
        if other.candidate_embeddings is None:
            return
        is_stale, known = other.is_stale, ops.convert_to_numpy(other.tower_checksum)
        ids = None if other.candidate_ids is None else ops.convert_to_numpy(other.candidate_ids)
        self._assign_corpus(on_host(other.candidate_embeddings)[: other.num_candidates], ids)
        self._note_tower()
        if is_stale or not known.any():
            self.tower_checksum.assign(known)  # type: ignore[union-attr]
        self._keep(other._candidates)

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
        if not self.is_refreshed_by_model and self.is_stale:
            warnings.warn(stale_index("the file holds the output of the old tower"), stacklevel=2)
        for number, variable in enumerate(self._own_variables()):
            unpadded = self._unpadded(store) if variable is self._refreshed_embeddings else store
            unpadded[str(number)] = variable

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` has saved. Files of version 0.1 have no checksum in the index."""
        self.note_freshness(False)
        variables = self._own_variables()
        num_saved = len(store.keys())
        if num_saved not in (len(variables), len(variables) - (not self._tied)):
            raise ValueError(
                "The saved weights of an index must be its own. Received: "
                f"{num_saved} weights for {self.name!r}, which has {len(variables)}. "
                "Create the index with the arguments that were saved."
            )
        for number, variable in enumerate(variables[:num_saved]):
            unpadded = self._unpadded(store) if variable is self._refreshed_embeddings else store
            variable.assign(unpadded[str(number)])
        if self.candidate_ids is not None:
            self.assign_ids(ops.convert_to_numpy(self.candidate_ids))

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
        check_k(self.k, num_candidates, int(np.isin(self.exclude_ids, ops.convert_to_numpy(present)).sum()))
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
            self.assign_ids(candidate_ids)
        _replace(table, embeddings)
        self._num_refreshed = num_candidates

    def _embed_corpus(self, candidates: Any, candidate_ids: Any, verbose: int | str = "auto") -> None:
        """Assigns the tower's output for the candidates, and notes the weights that computed it."""
        inputs = corpus.inputs_of(self.candidate_tower, candidates, self._features)
        self._assign_corpus(corpus.embed(self.candidate_tower, inputs, verbose), candidate_ids)
        self._note_tower()

    def _row_multiple(self) -> int:
        # A corpus has no optimizer slots, and is saved without padding: the least that the mesh in force needs.
        return axis_size(layout.axis_of_rows(self.mesh_axis, f"{self.path or self.name}/candidate_embeddings"))

    def _add_corpus(self, shape: tuple[int, int]) -> None:
        name = "candidate_embeddings"
        self._refreshed_embeddings = add_table(
            self, name, shape, "zeros", self._row_multiple(), self.mesh_axis, trainable=False, autocast=False
        )
        self._num_refreshed = shape[0]
        self._add_checksum()

    def _add_candidate_ids(self, num_candidates: int, candidate_ids: Any = None) -> None:
        self.candidate_ids = self.add_weight(
            shape=(num_candidates,), initializer="zeros", dtype="int32", trainable=False, name="candidate_ids"
        )
        self.id_lookup = self.add_weight(
            shape=(2, num_candidates), initializer="zeros", dtype="int32", trainable=False, name="id_lookup"
        )
        if candidate_ids is not None:
            self.assign_ids(candidate_ids)

    def assign_ids(self, candidate_ids: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Assigns `[num_candidates]` ids, which have been checked."""
        order = np.argsort(candidate_ids)
        _replace(self.candidate_ids, candidate_ids)
        _replace(self.id_lookup, np.stack([candidate_ids[order], order.astype("int32")]))

    def _split_rows(self) -> None:
        table = self.candidate_embeddings
        # With LoRA enabled, the table is a sum that the tower computes: there is no variable to lay out.
        if self.mesh_axis is not None and isinstance(table, keras.Variable):
            # With the slots of a row-sparse table.
            for variable in (table, *getattr(table, "slots", ())):
                layout.split_rows(variable, self.mesh_axis)


def is_table(tower: keras.layers.Layer) -> bool:
    """Returns whether the tower's output is a row of its table and nothing more."""
    calls = (keras.layers.Embedding.call, ShardedEmbedding.call, RowSparseEmbedding.call)
    return isinstance(tower, keras.layers.Embedding) and type(tower).call in calls


def check_candidates(
    candidate_tower: keras.layers.Layer, candidates: Any, candidate_ids: Any, exclude_ids: list[int], k: int
) -> np.ndarray[Any, np.dtype[np.int32]] | None:
    """Returns the ids of an index's candidates as int32, or `None` if row numbers are the ids.

    Args:
        candidate_tower: the tower.
        candidates: its inputs for the whole corpus, or `None`.
        candidate_ids: `[num_candidates]` ints, or `None`.
        exclude_ids: ids that are never returned.
        k: the number of candidates to return.

    Raises:
        TypeError: if ids are not integers, or candidates not arrays.
        ValueError: if ids are out of range, or `k` exceeds the number of candidates.
    """
    tied = is_table(candidate_tower)
    if not tied and candidates is None:
        # A loaded index: its candidates come with its weights.
        return None
    num_candidates = candidate_tower.input_dim if tied else corpus.num_rows(candidates)
    ids = check_corpus_ids(candidate_ids, num_candidates, exclude_ids)
    check_k(k, num_candidates, len(exclude_ids))
    return ids


def check_k(k: Any, num_candidates: int | None, num_excluded: int = 0) -> int:
    """Returns `k` as an int, or raises an error.

    Args:
        k: the number of candidates to return.
        num_candidates: the number of candidates.
        num_excluded: how many of them are excluded.

    Raises:
        TypeError: if `k` is a list or an array.
        ValueError: if `k` is no positive int, or exceeds the number of candidates that are not excluded.
    """
    assert num_candidates is not None
    if hasattr(k, "__len__") and not isinstance(k, str):
        raise TypeError(
            f"`k` is the number of candidates to return. Received: a list or an array (of type {type(k).__name__}). "
            "Name excluded ids: `exclude_ids=`."
        )
    remaining = num_candidates - num_excluded
    number = positive_int(k, "k")
    if number > remaining:
        raise ValueError(
            "`k` must not exceed the number of candidates. Received: "
            f"k={k} for {num_candidates} candidates, {num_excluded} of them excluded. "
            f"Ask for at most {remaining}."
        )
    return number


def _replace(variable: keras.Variable | None, value: np.ndarray[Any, Any]) -> None:
    """Assigns a value that may have another number of candidates than before."""
    assert variable is not None
    if tuple(value.shape) != tuple(variable.shape):
        # The conversion may fail, and must do so before the variable changes.
        value = ops.convert_to_tensor(value, dtype=variable.dtype)
        _keras.set_shape(variable, tuple(value.shape))
    variable.assign(value)
