"""Checks and defaults of the arguments of a two-tower model."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import keras
import keras_rs
from keras import ops

from keras_rs_contrib import _keras
from keras_rs_contrib.arguments import check_type
from keras_rs_contrib.index.candidate_store import is_table
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.index.shard_candidates import shard_candidates
from keras_rs_contrib.metrics import MeanReciprocalRank, NDCGAtK, RankMetric, RecallAtK
from keras_rs_contrib.negatives.mixed import MixedNegatives
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding
from keras_rs_contrib.tables.row_variable import check_optimizer
from keras_rs_contrib.task.two_tower_task import DistributedTwoTowerTask
from keras_rs_contrib.vocabulary import UNKNOWN_ROW, Vocabulary


def check_task(task: DistributedTwoTowerTask) -> None:
    """Raises `TypeError` if the task has the wrong type, or `ValueError` if its loss is not a scalar."""
    check_type("task", task, DistributedTwoTowerTask)
    if task.loss is not None and task.loss.reduction in (None, "none"):
        raise ValueError(
            "The loss of the task must be a scalar. Received: "
            f'{type(task.loss).__name__} without a reduction. Set `reduction="sum_over_batch_size"`.'
        )


def check_needs(model: Any) -> None:
    """Raises `ValueError` if a model with labels has options for negatives, or an option lacks what it needs.

    Args:
        model: a two-tower model whose options are set.
    """
    task = model.task
    need_ids = {
        name: getattr(model, name) is not None
        for name in ("sampling_probability", "mixed_negatives", "cross_batch_memory", "positive_feature")
    }
    need_ids["remove_accidental_hits"] = task.remove_accidental_hits
    need_negatives = {
        **need_ids,
        "negative_feature": model.negative_feature is not None,
        "num_hard_negatives": task.num_hard_negatives is not None,
        "negatives": task.negatives != "global",
    }
    about_negatives = [name for name, given in need_negatives.items() if given]
    if model.label is not None and about_negatives:
        raise ValueError(
            "With `label`, each query scores only its own candidate: there are no negatives. Received: `label` "
            f"together with {', '.join(f'`{name}`' for name in about_negatives)}. Drop `label` or the other arguments."
        )
    if model.mixed_negatives is not None and model.sampling_probability is not None:
        raise ValueError(
            "`mixed_negatives` has its own `StreamingSamplingProbability`, which replaces that of the model. "
            "Received: `mixed_negatives` and `sampling_probability`. Drop `sampling_probability`."
        )
    if model.negative_feature is None and model.negative_probability_feature is not None:
        raise ValueError(
            "`negative_probability_feature` holds the probabilities of `negative_feature`. Received: "
            "negative_feature=None. Name the feature that holds the negatives."
        )
    if model.negative_feature is not None and model.candidate_features != model.candidate_id:
        raise ValueError(
            "`negative_feature` holds ids, which must be the only feature of the candidate tower. Received: "
            f"candidate_features={model.candidate_features!r} and candidate_id={model.candidate_id!r}. Let the tower "
            "look up the other features by id, in a table of the corpus."
        )
    needs = [name for name, given in need_ids.items() if given]
    if model.candidate_id is None and needs:
        raise ValueError(
            f"`{needs[0]}` needs candidate ids. Received: candidate_id=None. "
            "Set `candidate_id` to the name of the feature that holds the ids."
        )


def check_optimizer_of_tables(optimizer: Any, model: keras.Model) -> None:
    """Raises `ValueError` if an optimizer cannot train a model's row-sparse tables."""
    for layer in _keras.sublayers(model):
        if (
            isinstance(optimizer, keras.optimizers.Optimizer)
            and isinstance(layer, RowSparseEmbedding)
            and layer.trainable
        ):
            check_optimizer(optimizer, layer.name)


def check_drawn_ids(
    mixed_negatives: MixedNegatives | None,
    candidate_tower: keras.layers.Layer,
    candidate_features: str | list[str],
    candidate_id: str | None,
) -> None:
    """Raises `ValueError` if the candidate tower cannot embed the ids that are drawn."""
    if mixed_negatives is None:
        return
    if candidate_features != candidate_id:
        raise ValueError(
            "`mixed_negatives` draws ids, which must be the only feature of the candidate tower. Received: "
            f"candidate_features={candidate_features!r} and candidate_id={candidate_id!r}. Let the tower look up the "
            "other features by id, in a table of the corpus."
        )
    num_candidates = mixed_negatives.sampling_probability.num_candidates
    if is_table(candidate_tower) and num_candidates > candidate_tower.input_dim:
        raise ValueError(
            "`mixed_negatives` must draw rows of the candidate tower. Received: "
            f"{num_candidates} candidates to draw from, for {candidate_tower.input_dim} rows. "
            "Create its `StreamingSamplingProbability` with at most as many candidates as rows."
        )


def feature_of_ids(
    candidate_id: str | None,
    candidate_features: str | list[str],
    candidate_tower: keras.layers.Layer,
    index: keras_rs.layers.BruteForceRetrieval | None,
) -> str | None:
    """Returns the name of the feature that holds candidate ids: by default, the only feature of an embedding tower."""
    if candidate_id is not None or not is_table(candidate_tower) or not isinstance(candidate_features, str):
        return candidate_id
    if isinstance(index, ShardedBruteForceRetrieval) and index.candidate_ids is not None:
        raise ValueError(
            "An index with `candidate_ids` needs the name of the feature that holds them. Received: "
            "candidate_id=None. Set `candidate_id` to that name."
        )
    return candidate_features


def metrics_of_batch(metrics: Any, label: str | None) -> list[keras.metrics.Metric]:
    """Returns the metrics of the logits of a batch as a list, or raises an error if they are none."""
    result: list[keras.metrics.Metric] = [metrics] if isinstance(metrics, keras.metrics.Metric) else list(metrics)
    for metric in result:
        check_type("batch_metrics", metric, keras.metrics.Metric)
        if isinstance(metric, RankMetric):
            raise TypeError(
                "`batch_metrics` compare one-hot labels with logits. Received: a rank metric. "
                "Pass it to the model as `corpus_metrics`."
            )
    if result and label is not None:
        raise ValueError(
            "`batch_metrics` are metrics of the in-batch softmax. Received: `label`. "
            "Pass metrics of labels and scores to `compile`."
        )
    return result


def metrics_of_corpus(metrics: Iterable[RankMetric] | None, k: int) -> list[RankMetric]:
    """Returns the given metrics, or by default those at `k`."""
    if isinstance(metrics, RankMetric):
        metrics = [metrics]
    metrics = [RecallAtK(k), NDCGAtK(k), MeanReciprocalRank()] if metrics is None else list(metrics)
    for metric in metrics:
        check_type("corpus_metrics", metric, RankMetric)
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise ValueError(f"`corpus_metrics` must have different names. Received: {names}. Drop or rename one of them.")
    return metrics


def default_task(
    label: str | None, retrieval: keras_rs.layers.BruteForceRetrieval | None, candidate_id: str | None
) -> DistributedTwoTowerTask:
    """Returns the task of a model that names none.

    The temperature performed best on MovieLens 100K: see `examples/benchmarks/README.md`. An index by dot product comes
    with TFRS's defaults.
    """
    similarity = retrieval.similarity if isinstance(retrieval, ShardedBruteForceRetrieval) else "cosine"
    if label is not None or similarity == "dot":
        return DistributedTwoTowerTask()
    return DistributedTwoTowerTask(
        similarity=similarity, temperature=0.2, remove_accidental_hits=candidate_id is not None
    )


def default_sampling(model: Any, vocabulary: Vocabulary | None) -> StreamingSamplingProbability | None:
    """Returns the sampling probability of a model that names neither it nor a task, or `None` if its ids are unknown.

    Args:
        model: a two-tower model whose task and index are set.
        vocabulary: that of candidate ids, or `None`.
    """
    if model.task.similarity == "dot" or model.candidate_id is None:
        return None
    if vocabulary is not None:
        return StreamingSamplingProbability(len(vocabulary))
    index = model.retrieval
    is_of_rows = index is not None and index.candidate_ids is None and index.num_candidates is not None
    return StreamingSamplingProbability(index.num_candidates) if is_of_rows else None


def index_of_tower(
    retrieval: keras_rs.layers.BruteForceRetrieval | None,
    candidate_tower: keras.layers.Layer,
    similarity: str,
    vocabulary: Vocabulary | None,
) -> ShardedBruteForceRetrieval | None:
    """Returns the index of the candidate tower, or `None` if it has none.

    Args:
        retrieval: an index, a plain layer, or `None`.
        candidate_tower: the candidate tower.
        similarity: that of the task.
        vocabulary: that of candidate ids, or `None`. Its row 0, for unknown names, is not a candidate.
    """
    if retrieval is None:
        if not is_table(candidate_tower):
            return None
        retrieval = keras_rs.layers.BruteForceRetrieval(k=max(1, min(10, candidate_tower.input_dim - bool(vocabulary))))
    if not isinstance(retrieval, ShardedBruteForceRetrieval):
        retrieval = shard_candidates(retrieval, candidate_tower, similarity=similarity)
    if retrieval.candidate_tower is not candidate_tower:
        raise ValueError(
            "The index must belong to the candidate tower of the model. Received: "
            f"an index of {retrieval.candidate_tower.name!r} and the candidate tower {candidate_tower.name!r}. "
            "Pass the same layer to both."
        )
    if retrieval.similarity != similarity:
        raise ValueError(
            "The index must rank by the similarity of the task. Received: "
            f"similarity={retrieval.similarity!r} in the index and {similarity!r} in the task. Pass the same to both."
        )
    return retrieval


def fit_to_vocabulary(index: ShardedBruteForceRetrieval, vocabulary: Vocabulary) -> None:
    """Excludes row 0 from an index of rows, or raises `ValueError` if the index has ids that are not names.

    The ids of an index over a feature tower must be known by now.
    """
    if index.candidate_ids is None:
        if index.num_candidates not in (None, len(vocabulary)):
            raise ValueError(
                "An index must have a row for each name of the vocabulary of candidates, and row 0. Received: "
                f"{index.num_candidates} rows for {len(vocabulary)}. Create the table with input_dim=len(vocabulary), "
                "or pass `candidate_ids=vocabulary.encode(names)` to `shard_candidates`."
            )
        index.exclude_ids = sorted({UNKNOWN_ROW, *index.exclude_ids})
        return
    ids = ops.convert_to_numpy(index.candidate_ids)
    if not ids.any():
        # The index comes from a config. Its ids follow with its weights.
        return
    wrong = ids[(ids <= UNKNOWN_ROW) | (ids >= len(vocabulary))]
    if wrong.size:
        raise ValueError(
            f"The ids of the index must be rows of the vocabulary of candidates, in [1, {len(vocabulary) - 1}]. "
            f"Received: {wrong[0]}. Pass `candidate_ids=vocabulary.encode(names, unknown='error')` to "
            "`shard_candidates`."
        )


def check_corpus_positives(corpus_positives: Any, label: str | None) -> float | str | None:
    """Returns `corpus_positives` of a model, or raises an error if it is neither a number nor the name of a feature."""
    if corpus_positives is None or isinstance(corpus_positives, str):
        return corpus_positives
    if not isinstance(corpus_positives, numbers.Real) or isinstance(corpus_positives, bool):
        raise TypeError(
            "`corpus_positives` must be the least label of a positive, or the name of a feature. Received: "
            f"corpus_positives={corpus_positives!r}. Pass a number, such as 4.0, or a key of the batch."
        )
    if label is None or not math.isfinite(corpus_positives):
        raise ValueError(
            "`corpus_positives` as a number is the least label of a positive, and needs `label`. Received: "
            f"corpus_positives={corpus_positives!r} and label={label!r}. Pass `label`, or the name of a feature."
        )
    return float(corpus_positives)
