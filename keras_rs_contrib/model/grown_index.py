"""The index of a larger copy of a model: its candidates, and their ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_rs_contrib.columns import names_in
from keras_rs_contrib.ids import check_corpus_ids
from keras_rs_contrib.model.configuration import fit_to_vocabulary
from keras_rs_contrib.model.growth import Growth


def copy_index(model: Any, larger: Any, growth: Growth, candidates: Any, candidate_ids: Any) -> None:
    """Copies the candidates of an index, or takes new ones.

    Args:
        model: the model.
        larger: the larger one, whose towers have their weights.
        growth: what has grown.
        candidates: as in `TwoTowerModel.extend`.
        candidate_ids: as in `TwoTowerModel.extend`.

    Raises:
        ValueError: if candidates or ids are missing, or do not fit.
    """
    old, index = model.retrieval, larger.retrieval
    if old is None:
        if candidates is not None or candidate_ids is not None:
            raise ValueError(
                "Only an index takes candidates. Received: `candidates` or `candidate_ids` for a model without one. "
                "Drop them."
            )
        return
    vocabulary = larger.model_inputs.vocabularies.of_candidates
    if old.is_tied:
        if candidate_ids is not None and vocabulary is not None:
            candidate_ids = vocabulary.encode(candidate_ids, unknown="error")
        _copy_ids(old, index, candidates, candidate_ids)
    else:
        index.take_corpus(old)
        if candidates is None and larger.candidate_id in growth.sizes:
            if candidate_ids is not None:
                raise ValueError(
                    "Ids are those of candidates. Received: `candidate_ids` without `candidates`. Pass both."
                )
            # Rows, and not names.
            index.take_vocabularies({})
            candidates, candidate_ids = _all_candidates(model, growth)
        if candidates is not None or candidate_ids is not None:
            index.refresh(candidates, candidate_ids)
        index.take_vocabularies(larger.vocabularies)
    if vocabulary is not None:
        before = list(index.exclude_ids)
        fit_to_vocabulary(index, vocabulary)
        index.exclude_ids = before


def _copy_ids(old: Any, index: Any, candidates: Any, candidate_ids: Any) -> None:
    """Gives the index of an embedding its ids, if the old one has some."""
    if candidates is not None:
        raise ValueError(
            "The index of an embedding is its whole table and takes no `candidates`. Received: new ones. Drop them."
        )
    if old.candidate_ids is None:
        if candidate_ids is not None:
            raise ValueError(
                "An index without ids returns row numbers and continues to do so. Received: `candidate_ids`. Drop them."
            )
        return
    before = ops.convert_to_numpy(old.candidate_ids)
    if candidate_ids is None:
        if old.num_candidates != index.num_candidates:
            raise ValueError(
                "An index with ids needs the ids of all rows if its table grows. Received: candidate_ids=None for "
                f"{index.num_candidates} rows. Pass the old ids, and then the new ones."
            )
        candidate_ids = before
    ids = check_corpus_ids(candidate_ids, index.num_candidates, [])
    assert ids is not None
    changed = np.flatnonzero(ids[: len(before)] != before)
    if changed.size:
        raise ValueError(
            "Old rows keep their ids. Received: the id "
            f"{ids[changed[0]]} for row {changed[0]}, whose id is {before[changed[0]]}. Pass the old ids, and then the "
            "new ones."
        )
    index.assign_ids(ids)


def _all_candidates(model: Any, growth: Growth) -> tuple[Any, Any]:
    """Returns the old and new candidates of a tower of ids alone, and their ids.

    Raises:
        ValueError: if the tower has other features.
    """
    index, name = model.retrieval, model.candidate_id
    before, after = growth.sizes[name]
    has_ids = index.candidate_ids is not None
    if names_in(model.candidate_features) != [name] or (not has_ids and index.num_candidates != before):
        raise ValueError(
            "The index of a feature tower needs the features of the whole catalogue if there are new candidates. "
            f"Received: a larger {name!r} and candidates=None. Pass `candidates`, and `candidate_ids` if it has ids."
        )
    ids = ops.convert_to_numpy(index.candidate_ids) if has_ids else np.arange(before)
    ids = np.concatenate([ids, np.arange(before, after)]).astype("int32")
    shape, _ = model._seen_features.get(name, ((), ""))
    return {name: ids.reshape(-1, *shape)}, ids if has_ids else None
