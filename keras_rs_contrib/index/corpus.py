"""The corpus of a feature tower: its inputs, its embeddings, and whether the tower has changed since."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp
from keras import ops

from keras_rs_contrib.arguments import on_host
from keras_rs_contrib.columns import as_array, as_dict, is_frame, is_series, names_in, select
from keras_rs_contrib.processes import verbosity
from keras_rs_contrib.vocabulary import Vocabulary

# Candidates that go through a feature tower at once: enough to keep it busy, with little memory.
REFRESH_BLOCK_SIZE = 4096
# A refresh of more blocks than this shows a progress bar.
MANY_BLOCKS = 16
# For each of the two checksums, the factor and the offset of the weights.
CHECKSUM_WEIGHTS = ((2654435761, 1), (2246822519, 7))


def num_rows(candidates: Any) -> int:
    """Returns how many rows each of the arrays has.

    Args:
        candidates: an array or a nested structure of arrays.

    Raises:
        TypeError: if a leaf is not an array.
        ValueError: if the arrays have no rows, or differ in length.
    """
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


def as_arrays(candidates: Any, vocabularies: dict[str, Vocabulary], feature: Any = None) -> Any:
    """Returns a DataFrame as a dict of its columns of numbers, a Series as an array, and others unchanged.

    Args:
        candidates: the inputs of a tower, in any form.
        vocabularies: those of features that hold names, which become rows.
        feature: the only feature of the tower, or `None` if it has several or is unknown. Then it has the only
            vocabulary.
    """
    if is_frame(candidates) or (vocabularies and isinstance(candidates, dict)):
        arrays = {}
        for name, column in as_dict(candidates).items():
            if name in vocabularies:
                arrays[name] = vocabularies[name].encode(column)
                continue
            # No tower can use the others, such as titles.
            with contextlib.suppress(ValueError):
                arrays[name] = as_array(column, f"`candidates`, in the column {name!r},")
        return arrays
    if feature is None and len(vocabularies) == 1:
        (feature,) = vocabularies
    if feature in vocabularies and candidates is not None:
        return vocabularies[feature].encode(candidates)
    return as_array(candidates, "`candidates`") if is_series(candidates) else candidates


def rows_of_names(candidate_ids: Any, vocabularies: dict[str, Vocabulary]) -> Any:
    """Returns candidate ids that are names of one of the vocabularies as its rows, and others unchanged.

    Raises:
        ValueError: if no vocabulary has all names, or more than one has them.
    """
    if candidate_ids is None or not vocabularies:
        return candidate_ids
    different = {id(each): each for each in vocabularies.values()}.values()
    found = []
    for vocabulary in different:
        with contextlib.suppress(TypeError, ValueError):
            found.append(vocabulary.encode(candidate_ids, unknown="error"))
    if len(found) != 1:
        raise ValueError(
            "`candidate_ids` must be names of one of the `vocabularies`. Received: names that "
            f"{len(found)} of {len(different)} vocabularies have. Pass the feature with the ids among `candidates`."
        )
    return found[0]


def input_names(tower: keras.layers.Layer) -> list[str] | None:
    """Returns the names of the inputs of a functional model that takes a dict, and `None` for other towers."""
    inputs = getattr(tower, "input", None) if isinstance(tower, keras.Model) and tower.built else None
    return list(inputs) if isinstance(inputs, dict) else None


def inputs_of(tower: keras.layers.Layer, candidates: Any, features: str | list[str] | None) -> Any:
    """Returns the part of the candidates that a tower takes.

    A functional model flattens a dict in the order of its keys and does not compare them with its inputs: another key
    would move the values of one input to the next.

    Args:
        tower: a candidate tower.
        candidates: an array or a nested structure of arrays, such as a dict with more features than the tower has.
        features: the feature of the tower, or a list of those that it takes as a dict; `None` if that is unknown.

    Raises:
        ValueError: if a feature is missing.
    """
    if not isinstance(candidates, dict):
        return candidates
    features = input_names(tower) if features is None else features
    if features is None or (isinstance(features, str) and features not in candidates):
        return candidates
    missing = [name for name in names_in(features) if name not in candidates]
    if missing:
        raise ValueError(
            f"`candidates` must have all features of the candidate tower. Received: {sorted(map(str, candidates))}, "
            f"without {missing}. Add them."
        )
    return select(candidates, features)


def embed(tower: keras.layers.Layer, candidates: Any, verbose: int | str = "auto") -> np.ndarray[Any, Any]:
    """Returns the tower's output for all candidates, computed in blocks.

    Args:
        tower: a candidate tower.
        candidates: its inputs for the whole corpus.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one if the corpus is large.

    Returns:
        `[num_candidates, embedding_dim]` float32.

    Raises:
        ValueError: if the output has another shape, or is not finite.
    """
    num_candidates = num_rows(candidates)
    starts = range(0, num_candidates, REFRESH_BLOCK_SIZE)
    if verbose == "auto":
        verbose = int(len(starts) > MANY_BLOCKS)
    progress = keras.utils.Progbar(num_candidates, verbose=verbosity(verbose), unit_name="candidate")
    blocks = []
    for start in starts:
        stop = min(start + REFRESH_BLOCK_SIZE, num_candidates)
        block = keras.tree.map_structure(lambda array, rows=slice(start, stop): array[rows], candidates)
        embeddings = on_host(tower(block, training=False)).astype("float32")
        if embeddings.ndim != 2 or embeddings.shape[0] != stop - start:
            raise ValueError(
                "The candidate tower must map candidates to `[num_candidates, embedding_dim]`. Received: "
                f"shape {embeddings.shape} for {stop - start} candidates. Flatten its output to one row each."
            )
        blocks.append(embeddings)
        progress.update(stop)
    return np.concatenate(blocks)


def check_finite(embeddings: Any) -> None:
    """Raises `ValueError` if `[num_candidates, embedding_dim]` embeddings are not finite."""
    finite = np.isfinite(on_host(embeddings)).all(axis=1)
    if not finite.all():
        raise ValueError(
            "The embeddings of candidates must be finite. Received: NaN or infinity for candidate "
            f"{int(np.argmin(finite))}. Check the inputs of the tower: an id outside a table gives NaN."
        )


def checksum(variables: list[keras.Variable]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns two numbers that change with any bit of the variables, and with the order of their elements.

    Formula, modulo 2**32, from `c = 1`, for each variable: `c = 31 c + sum over i of mix(bits[i]) w[i]`. The weights
    `w[i]` are odd, so that no change of a single element is lost. `mix` is the finalizer of MurmurHash3 (A. Appleby,
    2011): without it, pairs of flipped signs would cancel. Zeros at the end of a variable add nothing, and so padding
    rows do not count.
    """
    if keras.backend.backend() == "jax":
        return on_host(_jax_checksum([variable.value for variable in variables])).view("int32")
    total = np.ones(2, "uint32")
    for variable in variables:
        bits = _mixed(_bits(ops.convert_to_numpy(variable.value)))
        for i, (factor, offset) in enumerate(CHECKSUM_WEIGHTS):
            weights = (np.arange(bits.size, dtype="uint32") * np.uint32(factor) + np.uint32(offset)) | np.uint32(1)
            # Slices, because scalars warn when they overflow.
            total[i : i + 1] = total[i : i + 1] * np.uint32(31) + np.sum(bits * weights, dtype="uint32")
    return total.view("int32")


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    array = array.reshape(-1)
    return (array if array.dtype == bool else array.view(f"uint{array.dtype.itemsize * 8}")).astype("uint32")


def _mixed(bits: Any) -> Any:
    """Returns a nonlinear function of each of the uint32 numbers, 0 for 0 and different for different ones."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


@jax.jit
def _jax_checksum(arrays: list[Any]) -> Any:
    total = jnp.ones(2, jnp.uint32)
    for array in arrays:
        size = array.dtype.itemsize * 8
        bits = lax.bitcast_convert_type(array, f"uint{size}") if array.dtype != bool else array
        bits = _mixed(bits.reshape(-1).astype(jnp.uint32))
        places = lax.iota(jnp.uint32, bits.size)
        for i, (factor, offset) in enumerate(CHECKSUM_WEIGHTS):
            weights = (places * np.uint32(factor) + np.uint32(offset)) | np.uint32(1)
            total = total.at[i].set(total[i] * np.uint32(31) + jnp.sum(bits * weights, dtype=jnp.uint32))
    return total
