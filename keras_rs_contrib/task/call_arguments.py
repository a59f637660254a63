"""The arguments of a call of the task: checks of their shapes, and a batch in which padding has no values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_rs_contrib.arguments import check_sample_weight, differ, known_values
from keras_rs_contrib.ids import NO_CANDIDATE, to_int32


class CallArguments(NamedTuple):
    """The arguments of `DistributedTwoTowerTask.call`, which documents them. One that is not given is `None`."""

    query_embeddings: Any
    candidate_embeddings: Any
    labels: Any = None
    sample_weight: Any = None
    candidate_ids: Any = None
    candidate_sampling_probability: Any = None
    score_mask: Any = None
    candidate_mask: Any = None
    positive_ids: Any = None
    negative_embeddings: Any = None
    negative_ids: Any = None
    negative_sampling_probability: Any = None


ID_ARGUMENTS = ("candidate_ids", "positive_ids", "negative_ids")

ARGUMENTS_FOR_NEGATIVES = (
    "candidate_ids",
    "candidate_sampling_probability",
    "score_mask",
    "positive_ids",
    "negative_embeddings",
    "negative_ids",
    "negative_sampling_probability",
)


def to_tensors(arguments: CallArguments) -> CallArguments:
    """Returns the arguments as tensors, with ids in int32, or raises `TypeError` if one of them is a dict."""

    def to_tensor(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            raise TypeError(
                f"`{name}` must be a single array. Received: a dict with the keys {list(value)}. Pass one of its "
                "values. When the targets of `fit` are a dict, Keras makes `sample_weight` a dict with the same keys."
            )
        return ops.convert_to_tensor(to_int32(value, name) if name in ID_ARGUMENTS else value)

    return CallArguments(
        **{name: None if value is None else to_tensor(name, value) for name, value in arguments._asdict().items()}
    )


def check_arguments(arguments: CallArguments, settings_for_negatives: Sequence[str]) -> None:
    """Checks that the arguments fit together.

    Args:
        arguments: tensors, which may be symbolic.
        settings_for_negatives: names of the task's settings for negatives that differ from their defaults.

    Raises:
        ValueError: if they do not, or if values of `sample_weight` that are known are negative or not finite.
    """
    _check_embeddings(arguments)
    _check_shapes(arguments)
    if arguments.sample_weight is not None:
        check_sample_weight(arguments.sample_weight, arguments.candidate_mask)
    for name in ("candidate_sampling_probability", "negative_sampling_probability"):
        given = getattr(arguments, name)
        values = None if given is None else known_values(given)
        if values is not None and (values < 0).any():
            raise ValueError(
                f"`{name}` must be at least 0. Received: {values[values < 0][0]}. Pass probabilities, not their "
                "logarithms."
            )
    if arguments.labels is not None:
        _check_labels(arguments, settings_for_negatives)
    else:
        _check_negatives(arguments, settings_for_negatives)


def _check_negatives(arguments: CallArguments, settings_for_negatives: Sequence[str]) -> None:
    if "remove_accidental_hits" in settings_for_negatives and arguments.candidate_ids is None:
        raise ValueError(
            "`remove_accidental_hits=True` requires the ids of the candidates. Received: candidate_ids=None. "
            "Pass `candidate_ids`, one int for each row of `candidate_embeddings`."
        )
    if arguments.positive_ids is not None and arguments.candidate_ids is None:
        raise ValueError(
            "`positive_ids` are compared with the ids of the candidates. Received: candidate_ids=None. "
            "Pass `candidate_ids`, one int for each row of `candidate_embeddings`."
        )
    if arguments.negative_embeddings is not None:
        return
    for name in ("negative_ids", "negative_sampling_probability"):
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"`{name}` describes the rows of `negative_embeddings`. Received: negative_embeddings=None. "
                "Pass the embeddings too, or append the negatives to the candidates if all queries share them."
            )


def _check_embeddings(arguments: CallArguments) -> None:
    query_shape, candidate_shape = tuple(arguments.query_embeddings.shape), tuple(arguments.candidate_embeddings.shape)
    if len(query_shape) not in (2, 3) or len(candidate_shape) != 2:
        raise ValueError(
            "`query_embeddings` must have shape `[batch, embedding_dim]` or `[batch, num_heads, embedding_dim]`, "
            "and `candidate_embeddings` must have shape `[num_candidates, embedding_dim]`. Received: shapes "
            f"{query_shape} and {candidate_shape}. Reshape the outputs of the towers to these ranks."
        )
    if differ(query_shape[-1], candidate_shape[-1]):
        raise ValueError(
            "Both towers must return embeddings of the same dimension. Received: "
            f"{query_shape[-1]} for the queries and {candidate_shape[-1]} for the candidates. "
            "Project one of them, for instance with a final `keras.layers.Dense`."
        )
    batch, num_candidates = query_shape[0], candidate_shape[0]
    if batch is not None and num_candidates is not None and num_candidates < batch:
        raise ValueError(
            "Row i of `candidate_embeddings` must be the positive candidate of query i. Received: "
            f"{batch} queries and {num_candidates} candidates. Pass at least as many candidates as queries."
        )


def _check_shapes(arguments: CallArguments) -> None:
    batch, num_candidates = arguments.query_embeddings.shape[0], arguments.candidate_embeddings.shape[0]
    embedding_dim = arguments.query_embeddings.shape[-1]
    negatives = arguments.negative_embeddings
    num_own = "n" if negatives is None or len(negatives.shape) != 3 else negatives.shape[1]
    # The shape of each argument, in which letters stand for any size, and what to do about another shape.
    expected: dict[str, tuple[tuple[int | str | None, ...], str]] = {
        "labels": ((batch,), "Pass one label for each query."),
        "sample_weight": ((batch,), "Pass one weight for each query."),
        "candidate_ids": ((num_candidates,), "Include the ids of the extra negatives."),
        "candidate_sampling_probability": ((num_candidates,), "Include the probabilities of the extra negatives."),
        "score_mask": ((batch, num_candidates), "Pass one bool for each pair of a query and a candidate."),
        "candidate_mask": ((num_candidates,), "Include the mask of the extra negatives."),
        "positive_ids": ((batch, "m"), "Pass one row of ids for each query, padded with -1."),
        "negative_embeddings": ((batch, "n", embedding_dim), "Pass the same number of negatives for each query."),
        "negative_ids": ((batch, num_own), "Pass one id for each negative, or -1 for padding."),
        "negative_sampling_probability": ((batch, num_own), "Pass one probability for each negative."),
    }
    for name, (shape, fix) in expected.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        received = tuple(value.shape)
        wanted = [None if isinstance(size, str) else size for size in shape]
        if len(received) != len(shape) or any(map(differ, received, wanted)):
            raise ValueError(
                f"`{name}` must have shape [{', '.join(map(str, shape))}] for {batch} queries and {num_candidates} "
                f"candidates. Received: shape {received}. {fix}"
            )


def _check_labels(arguments: CallArguments, settings_for_negatives: Sequence[str]) -> None:
    for_negatives = [name for name in ARGUMENTS_FOR_NEGATIVES if getattr(arguments, name) is not None]
    for_negatives += settings_for_negatives
    if for_negatives:
        raise ValueError(
            "With `labels`, each query is scored with its own candidate only and has no negatives. Received: "
            f"`labels` together with {', '.join(f'`{name}`' for name in for_negatives)}. "
            "Remove `labels`, or the arguments for negatives."
        )
    batch, num_candidates = arguments.query_embeddings.shape[0], arguments.candidate_embeddings.shape[0]
    if differ(batch, num_candidates):
        raise ValueError(
            "With `labels`, each query is scored with its own candidate only. Received: "
            f"{batch} queries and {num_candidates} candidates. Remove the extra negatives, or `labels`."
        )


def without_padding(arguments: CallArguments) -> CallArguments:
    """Returns the arguments with 0 in the padding rows, which may hold anything: NaN would reach every gradient.

    Args:
        arguments: tensors.

    Returns:
        The arguments with a bool `candidate_mask`, if there is one. `candidate_mask` marks padding, and a
        `negative_ids` of -1.
    """
    keep: dict[str, Any] = {}
    if arguments.candidate_mask is not None:
        arguments = arguments._replace(candidate_mask=ops.cast(arguments.candidate_mask, "bool"))
        keep.update(dict.fromkeys(("candidate_embeddings", "candidate_sampling_probability"), arguments.candidate_mask))
        keep.update(dict.fromkeys(("query_embeddings", "labels", "sample_weight"), valid_queries(arguments)))
    is_negative = _present_negatives(arguments)
    if is_negative is not None:
        keep.update(dict.fromkeys(("negative_embeddings", "negative_sampling_probability"), is_negative))
    zeroed = {name: zero_where_false(rows, getattr(arguments, name)) for name, rows in keep.items()}
    return arguments._replace(**zeroed)


def _present_negatives(arguments: CallArguments) -> Any:
    """Returns which of the queries' own negatives are not padding, or `None` if all are present.

    Returns:
        `[batch, n]` bool, or `[batch]` if only the queries have padding.
    """
    valid = valid_queries(arguments)
    if arguments.negative_ids is None:
        return valid
    is_negative = ops.not_equal(arguments.negative_ids, NO_CANDIDATE)
    return is_negative if valid is None else ops.logical_and(is_negative, ops.expand_dims(valid, 1))


def valid_queries(arguments: CallArguments) -> Any:
    """Returns which queries are not padding, `[batch]` bool, or `None` if there is no `candidate_mask`."""
    if arguments.candidate_mask is None:
        return None
    return arguments.candidate_mask[: ops.shape(arguments.query_embeddings)[0]]


def zero_where_false(keep: Any, values: Any) -> Any:
    """Returns `values` with 0 where `keep` is False, which has their first dimensions; `None` stays `None`."""
    if values is None:
        return None
    for _ in range(len(values.shape) - len(keep.shape)):
        keep = ops.expand_dims(keep, -1)
    return ops.where(keep, values, ops.zeros_like(values))
