"""Whether the index of a feature tower is outdated, because the tower has changed since."""

from __future__ import annotations

import types
import warnings
import weakref
from typing import Any

import jax
import keras
import numpy as np
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.index import corpus
from keras_rs_contrib.vocabulary import Vocabulary

# A checksum that no tower has, up to chance.
UNKNOWN_TOWER = (1, -1)


class Staleness(keras.layers.Layer):  # type: ignore[misc]
    """The part of an index that knows which weights of its tower have computed it, by their checksum.

    Attributes:
        candidate_tower: the tower.
        tower_checksum: `[2]` int32 variable, of the weights that computed the index, or zeros if they are unknown; or
            `None` if the index is the tower's own table, or does not exist yet.
        is_refreshed_by_model: whether a model refreshes the index before it is used or saved.
    """

    candidate_tower: keras.layers.Layer
    tower_checksum: keras.Variable | None = None
    is_refreshed_by_model = False
    _candidates: Any = None
    # Those of features of the candidates that hold names.
    _vocabularies: dict[str, Vocabulary] = types.MappingProxyType({})  # type: ignore[assignment]
    # The features of the tower, of which the candidates may have more, or `None` if they are unknown.
    _features: str | list[str] | None = None
    _tied = False
    # Which arrays the weights of the tower were when their checksum was computed last, and whether the index was stale,
    # which is `None` if that is unknown.
    _staleness: tuple[list[Any], bool | None] = ([], False)

    # On backends other than JAX, whether the index was not stale when it was looked at last.
    _is_fresh = False

    def refresh(self, *, verbose: int | str = "auto") -> None:
        """Computes the index again. Defined by a subclass."""
        raise NotImplementedError

    @property
    def has_candidates(self) -> bool:
        """Whether the index of a feature tower has the tower's inputs, which are not saved with it."""
        return self._candidates is not None

    @property
    def is_stale(self) -> bool:
        """Whether the candidate tower has changed since the index was computed, so that its results are outdated.

        `False` for the index of an embedding, and if it is unknown which weights computed the index.
        """
        if self.tower_checksum is None:
            return False
        known = ops.convert_to_numpy(self.tower_checksum)
        return bool(known.any()) and not np.array_equal(known, self._current_checksum())

    def take_features(self, features: str | list[str]) -> None:
        """Takes the features of the tower from candidates that have more of them.

        Args:
            features: the name of the only feature, or a list of those that the tower takes as a dict.

        Raises:
            ValueError: if the candidates of the index lack one.
        """
        object.__setattr__(self, "_features", features)
        if self._tied or not isinstance(self._candidates, dict):
            return
        inputs = corpus.inputs_of(self.candidate_tower, self._candidates, features)
        if inputs is not self._candidates and (not isinstance(inputs, dict) or len(inputs) < len(self._candidates)):
            # The tower has received all of them.
            assert self.tower_checksum is not None
            self.tower_checksum.assign(UNKNOWN_TOWER)

    def take_vocabularies(self, vocabularies: dict[str, Vocabulary]) -> None:
        """Takes the vocabularies of features that hold names in the candidates of each later `refresh`."""
        # Hidden from Keras's attribute tracking: they belong to the model.
        object.__setattr__(self, "_vocabularies", dict(vocabularies))

    def _as_arrays(self, candidates: Any) -> Any:
        feature = self._features if isinstance(self._features, str) else None
        return corpus.as_arrays(candidates, self._vocabularies, feature)

    def refresh_if_stale(self, verbose: int | str = "auto") -> None:
        """Refreshes an index over a feature tower if the tower's weights have changed since the last refresh.

        Args:
            verbose: as in `refresh`.

        Raises:
            ValueError: if the index is stale and, after loading, has no candidates to refresh it with.
        """
        if self.tower_checksum is None:
            return
        current, known = self._current_checksum(), ops.convert_to_numpy(self.tower_checksum)
        if not np.array_equal(known, current):
            if self.has_candidates:
                self.refresh(verbose=verbose)
            elif known.any():
                raise ValueError(
                    "The candidate tower has changed since the last refresh of the index, and the index does not have "
                    "the tower's inputs, which are not saved with it. Received: a stale index. "
                    "Pass them: `model.retrieval.refresh(candidates)`."
                )
            else:
                self.tower_checksum.assign(current)
        self.note_freshness(True)

    def note_freshness(self, is_fresh: bool) -> None:
        """Notes whether the index is known not to be stale, on backends whose weights do not tell."""
        object.__setattr__(self, "_is_fresh", is_fresh)

    def warn_if_stale(self) -> None:
        """Warns if the index is stale. Compiled programs cannot tell, and nothing happens while they are traced."""
        if keras.backend.backend() == "jax" and self._was_seen_stale():
            warnings.warn(stale_index("results are those of the old tower"), stacklevel=2)

    @property
    def may_be_stale(self) -> bool:
        """Whether `refresh_if_stale` may have something to do."""
        if self.tower_checksum is None:
            return False
        if keras.backend.backend() == "jax":
            return self._was_seen_stale(if_unknown=True)
        # Other backends do not train. They assign in place, and a checksum for each request would take too long.
        return not self._is_fresh

    def _was_seen_stale(self, if_unknown: bool = False) -> bool:
        """Returns whether the index is stale. Computes a checksum only after a weight of the tower has changed.

        Args:
            if_unknown: the result if it is unknown which weights computed the index, or while these are traced.
        """
        if self.tower_checksum is None:
            return False
        variables = [*self.candidate_tower.weights, self.tower_checksum]
        if not all(map(_keras.has_value, variables)):
            return if_unknown
        values = [variable.value for variable in variables]
        if any(isinstance(value, jax.core.Tracer) for value in values):
            return if_unknown
        # Each assignment makes a new array.
        seen, is_stale = self._staleness
        if len(seen) != len(values) or any(ref() is not value for ref, value in zip(seen, values, strict=True)):
            with jax.ensure_compile_time_eval():
                is_known = ops.convert_to_numpy(self.tower_checksum).any()
                is_stale = self.is_stale if is_known else None
            object.__setattr__(self, "_staleness", ([weakref.ref(value) for value in values], is_stale))
        return if_unknown if is_stale is None else is_stale

    def check_can_refresh(self) -> None:
        """Raises `ValueError` if training would make the index stale with no way to refresh it."""
        if not self._tied and not self.has_candidates:
            raise ValueError(
                "To validate while the candidate tower is trained, the index needs the tower's inputs for the whole "
                "corpus. Received: a model whose index has none: they are not saved with it. "
                "Pass them first: `model.retrieval.refresh(candidates)`."
            )

    def _add_checksum(self) -> None:
        self.tower_checksum = self.add_weight(
            shape=(2,), initializer="zeros", dtype="int32", trainable=False, autocast=False, name="tower_checksum"
        )

    def _note_tower(self) -> None:
        """Notes that the weights that the tower has now have computed the index."""
        assert self.tower_checksum is not None
        self.tower_checksum.assign(self._current_checksum())

    def _current_checksum(self) -> np.ndarray[Any, Any]:
        # Without the state of random generators, which inference does not use.
        return corpus.checksum(self.candidate_tower.weights)


def stale_index(consequence: str) -> str:
    """Returns a warning of a stale index that names the consequence."""
    return (
        "The candidate tower has changed since the last refresh of its index. Received: a stale index, so that "
        f"{consequence}. Call `index.refresh()`, or pass `callbacks=[RefreshCandidates(index)]` to `fit`."
    )
