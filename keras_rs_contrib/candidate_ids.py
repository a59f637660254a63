"""Candidate ids: int32 labels of candidates, refused where a conversion would change them."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

# Stands for "no candidate" where there are fewer candidates than places.
NO_CANDIDATE = -1


def check_candidate_ids(candidate_ids: Any, name: str = "candidate_ids") -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns ids as int32, or raises where one of them is no int32.

    JAX wraps wider integers to int32 without a word, so that 2**31 + 5 would become another candidate's id.

    Args:
        candidate_ids: integers of any width, as a list, an array or a tensor.
        name: what the ids are called in errors.

    Returns:
        int32 array, shape of `candidate_ids`.

    Raises:
        TypeError: if they are no integers.
        ValueError: if one lies outside int32.
    """
    ids = ops.convert_to_numpy(candidate_ids) if ops.is_tensor(candidate_ids) else np.asarray(candidate_ids)
    if ids.size == 0:
        return ids.astype(np.int32)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"`{name}` must be integers. Received: dtype {ids.dtype}, such as {ids.flat[0]!r}. "
            "Number the candidates and keep the table of their names, or use `keras.layers.StringLookup`."
        )
    limits = np.iinfo(np.int32)
    outside = ids[(ids < limits.min) | (ids > limits.max)]
    if outside.size:
        raise ValueError(
            f"`{name}` must lie in [{limits.min}, {limits.max}], the range of int32. "
            f"Received: {int(outside[0])}. Number the candidates from 0 and keep the table of their ids."
        )
    return ids.astype(np.int32)


def check_corpus_ids(
    candidate_ids: Any, num_candidates: int, exclude_ids: Any = ()
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns the ids of a corpus as int32, one for each candidate, each once.

    Args:
        candidate_ids: `[num_candidates]` integers.
        num_candidates: rows in the candidate table.
        exclude_ids: ids that are to be left out; they must be of the corpus.

    Returns:
        `[num_candidates]` int32.

    Raises:
        TypeError: if they are no integers.
        ValueError: if their number is wrong, one lies outside int32, occurs twice, or is -1, which means "none", or
            one to be left out is not there.
    """
    ids = check_candidate_ids(candidate_ids)
    if ids.shape != (num_candidates,):
        raise ValueError(
            "`candidate_ids` needs one id for each candidate. Received: "
            f"shape {ids.shape} for {num_candidates} candidates. Pass a flat list of {num_candidates} ids."
        )
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size < ids.size:
        raise ValueError(
            "`candidate_ids` must differ from one another. Received: "
            f"{int(unique[counts > 1][0])} for {int(counts[counts > 1][0])} candidates. Drop the duplicates."
        )
    if NO_CANDIDATE in unique:
        raise ValueError(
            f"`candidate_ids` must not hold {NO_CANDIDATE}, which stands for no candidate. "
            f"Received: {NO_CANDIDATE} for one of {num_candidates} candidates. Give that candidate another id."
        )
    unknown = np.setdiff1d(check_candidate_ids(exclude_ids, name="exclude_ids"), unique)
    if unknown.size:
        raise ValueError(
            "`exclude_ids` must be ids of candidates. Received: "
            f"{int(unknown[0])} for {num_candidates} candidates with ids {int(ids.min())} to {int(ids.max())}. Drop it."
        )
    return ids
