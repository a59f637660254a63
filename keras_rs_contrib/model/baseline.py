"""What a model is compared with after training, and what it leaves out of its lists."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np

from keras_rs_contrib import columns, processes
from keras_rs_contrib.arguments import on_host
from keras_rs_contrib.batches import PaddedBatches
from keras_rs_contrib.model.feature_names import flat
from keras_rs_contrib.model.inputs import ModelInputs
from keras_rs_contrib.model.training_data import ids_of
from keras_rs_contrib.vocabulary import UNKNOWN_ROW


def check_seen(seen: Any, inputs: ModelInputs) -> tuple[Any, Any] | None:
    """Returns the ids of queries and candidates in `seen` of `fit`, or `None` if there are none yet.

    Args:
        seen: as in `fit`.
        inputs: how batches are checked.

    Raises:
        TypeError: if it is not of the form that `fit` describes.
        ValueError: if the model has no `query_id` or `candidate_id`, or the data lack one of them.
    """
    if seen is None:
        return None
    names = inputs.names
    for argument, name in (("query_id", names.query_id), ("candidate_id", names.candidate_id)):
        if name is None:
            raise ValueError(
                f"`seen` needs the ids of queries and candidates. Received: a model with {argument}=None. "
                f"Set `{argument}` to the name of the feature that holds the ids."
            )
    if isinstance(seen, str) and seen == "training":
        return None
    seen = columns.as_dict(seen)
    if not isinstance(seen, dict):
        raise TypeError(
            f"`seen` must be 'training', or a dict or DataFrame of features. Received: {seen!r}. "
            f"Pass the features {names.query_id!r} and {names.candidate_id!r}."
        )
    assert names.query_id is not None
    assert names.candidate_id is not None
    used = [names.query_id, names.candidate_id]
    names.check(seen, used)
    for name in used:
        if np.ndim(seen[name]) == 0:
            raise ValueError(
                f"The feature {name!r} of `seen` must have a row for each candidate that was seen. Received: "
                f"{seen[name]!r}. Pass a list, such as [{seen[name]!r}]."
            )
    arrays = columns.arrays_of(inputs.vocabularies.encode({name: seen[name] for name in used}, used), used)
    queries, candidates = (_checked_ids(name, flat(np.asarray(arrays[name]))) for name in used)
    if len(queries) != len(candidates):
        raise ValueError(
            "`seen` needs a candidate for each query. Received: "
            f"{len(queries)} queries and {len(candidates)} candidates. Cut them from the same rows."
        )
    if names.query_id in inputs.vocabularies.by_feature:
        # Queries that are not in the vocabulary have nothing in common.
        is_known = queries > UNKNOWN_ROW
        queries, candidates = queries[is_known], candidates[is_known]
    return queries, candidates


def _checked_ids(name: str, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if ids.ndim != 1:
        raise ValueError(
            f"The feature {name!r} of `seen` must be flat, one candidate in each row. Received: shape {ids.shape}. "
            "Repeat the query for each of its candidates: `DataFrame.explode`."
        )
    limits = np.iinfo("int32")
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < limits.min or ids.max() > limits.max):
        what = f"dtype {ids.dtype}" if ids.dtype.kind not in "iu" else f"values up to {ids.max()}"
        raise ValueError(
            f"The feature {name!r} of `seen` must hold ids, as integers in the range of int32. Received: {what}. "
            "Pass a `Vocabulary` of this feature to the model as `vocabularies`."
        )
    return ids.astype("int32")


def say_that_seen_are_ranked(model: Any) -> None:
    """Prints once that validation also ranks what queries have seen, if it does."""
    is_known = model.model_inputs.training_data.has_seen or model.exclude_feature is not None or not model.exclude_seen
    if not is_known and not model._has_said_that_seen_are_ranked:
        object.__setattr__(model, "_has_said_that_seen_are_ranked", True)
        print(
            "Validation also ranks what a query has seen in training.\n"
            'To leave it out of the lists, pass seen="training" to `fit`.'
        )


def popularity_metrics(model: Any, batches: PaddedBatches, steps: int | None) -> dict[str, float]:
    """Returns the corpus metrics of popularity for the rows of batches, or an empty dict if they cannot be computed.

    Args:
        model: the model.
        batches: checked batches, as in `evaluate`.
        steps: the number of batches to read, or `None` for all.
    """
    inputs = model.model_inputs
    popularity, names = inputs.training_data.popularity(inputs.retrieval, ids_of(inputs.retrieval)), inputs.names
    if popularity is None or batches.is_exhausted:
        return {}
    metrics = [type(metric).from_config(metric.get_config()) for metric in model.corpus_metrics]
    ranked = []
    for x, y, sample_weight in itertools.islice(batches, steps):
        candidate_ids = np.reshape(x[names.candidate_id], (-1, 1))
        ranks = popularity.ranks(candidate_ids, exclude_ids=names.exclude_ids(x))[:, 0]
        ranked.append((ranks, on_host(model._weight_of_positives(x, y, sample_weight))))
    if processes.have_own_data():
        ranked = [each for batches_of_process in processes.gather(ranked) for each in batches_of_process]
    for ranks, weight in ranked:
        for metric in metrics:
            metric.update_state(ranks, sample_weight=weight)
    return {metric.name: float(metric.result()) for metric in metrics}


def report_popularity(
    model: Any, validation: PaddedBatches, steps: int | None, history: dict[str, list[float]], verbose: int | str
) -> None:
    """Prints the metrics of the last validation next to those of popularity, and warns if popularity is better.

    Args:
        model: the model, after training.
        validation: checked batches.
        steps: the number of batches of a validation, or `None` for all.
        history: the values of all epochs, by name.
        verbose: 0 to print nothing.
    """
    ours = {metric.name: history[f"val_{metric.name}"][-1] for metric in model.corpus_metrics
            if history.get(f"val_{metric.name}")}  # fmt: skip
    theirs = popularity_metrics(model, validation, steps) if ours else {}
    if not theirs:
        return
    if verbose:
        print(_table(ours, theirs))
    signs = {metric.name: 1 if metric.higher_is_better else -1 for metric in model.corpus_metrics}
    gains = {name: signs[name] * (value - theirs[name]) for name, value in ours.items()}
    if max(gains.values()) <= 0 > min(gains.values()) and processes.is_first():
        name = min(gains, key=gains.__getitem__)
        warnings.warn(
            "The model ranks worse than the popularity of candidates in the training data. Received: "
            f"val_{name}={ours[name]:.4f}, and {theirs[name]:.4f} for popularity. Train longer, or leave `task` and "
            "`sampling_probability` at their defaults.",
            stacklevel=3,
        )


def _table(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Returns a table of metrics, a row for each ranking."""
    rows = [["Last validation", *ours]]
    rows += [[label, *(f"{values[name]:.4f}" for name in ours)] for label, values in
             (("  this model", ours), ("  popularity", theirs))]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    cells = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    return "\n".join("  ".join(row) for row in cells)
