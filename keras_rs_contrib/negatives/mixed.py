"""Mixed negatives: the candidates of the batch and uniform draws from the corpus."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import explains_keywords, positive_int
from keras_rs_contrib.ids import IdArguments, check_exclude_ids
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability


class MixedCandidates(NamedTuple):
    """The result of `MixedNegatives`. The fields are arguments of `DistributedTwoTowerTask`.

    Attributes:
        candidate_ids: `[num_candidates]` int32, those of the batch first.
        candidate_sampling_probability: `[num_candidates]` float32.
        candidate_mask: `[num_candidates]` bool; False marks padding.
    """

    candidate_ids: Any
    candidate_sampling_probability: Any
    candidate_mask: Any


def mixed_sampling_probability(
    in_batch_probability: Any, uniform_probability: Any, num_in_batch: Any, num_negatives: Any
) -> Any:
    """Returns the sampling probability of candidates under a mixture of in-batch and uniform draws.

    Formula: `(n * p_in_batch + m * p_uniform) / (n + m)`, with `n = num_in_batch` and `m = num_negatives`.

    A candidate gets the probability of the mixture, whether it was an in-batch or a uniform draw. Without this, a
    popular candidate among the uniform draws, or a rare one in the batch, would have far more weight than the others.
    This is the balance heuristic of multiple importance sampling.

    Args:
        in_batch_probability: float, probability that an in-batch draw is the candidate.
        uniform_probability: float, probability that a uniform draw is the candidate: `1 / corpus_size`, or 0 for an
            excluded id.
        num_in_batch: int, number of in-batch draws.
        num_negatives: int, number of uniform draws.

    Returns:
        float32, shape of `in_batch_probability`: the probability that a draw from the mixture is the candidate; 0 if
        there are no draws.

    References: Yang et al., "Mixed negative sampling for learning two-tower neural networks in recommendations", WWW
    2020; Veach and Guibas, "Optimally combining sampling techniques for Monte Carlo rendering", SIGGRAPH 1995.
    """
    num_in_batch, num_negatives = ops.cast(num_in_batch, "float32"), ops.cast(num_negatives, "float32")
    expected_count = ops.add(
        ops.multiply(num_in_batch, ops.cast(in_batch_probability, "float32")),
        ops.multiply(num_negatives, ops.cast(uniform_probability, "float32")),
    )
    return ops.divide_no_nan(expected_count, ops.add(num_in_batch, num_negatives))


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class MixedNegatives(IdArguments, keras.layers.Layer):  # type: ignore[misc]
    """Adds candidates drawn uniformly from the corpus to the candidates of the batch, as extra negatives.

    The candidates of a batch are mostly popular. Candidates in the long tail are rarely negatives, so training hardly
    constrains their scores. Uniform draws cover the long tail, and the batch covers the head. For queries that favour
    popular candidates, in-batch negatives approximate the softmax over the corpus best; for other queries, uniform
    negatives do. An equal mixture is close to the better of the two for each query, and is the best choice for a mix of
    queries.

    The layer returns ids. Look them up in a single call, and pass embeddings, ids and probabilities to a
    `DistributedTwoTowerTask` with `remove_accidental_hits=True`, because the positive of a query may be drawn again.

    Outside training, the layer returns the batch with its in-batch probabilities. It draws and counts nothing, so the
    evaluation loss is deterministic.

    Args:
        sampling_probability: `StreamingSamplingProbability` of the corpus. This layer calls it for each batch. Do not
            call it elsewhere in training, or it counts batches twice.
        num_negatives: positive int, number of candidates to draw for each batch. All queries share them.
        seed: int, seed of the draws, which do not depend on the number of devices.
        exclude_ids: ids that are never drawn, such as a padding id.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if `sampling_probability` has another type, or ids are not integers.
        ValueError: if an argument is out of range.

    Example:
    ```python
    candidate_tower = keras.layers.Embedding(100, 2)
    mixed_negatives = MixedNegatives(StreamingSamplingProbability(100), num_negatives=8, exclude_ids=[0])
    candidates = mixed_negatives(np.array([3, 7, 3, 1]), training=True)
    loss = DistributedTwoTowerTask(remove_accidental_hits=True)(
        keras.random.normal((4, 2)), candidate_tower(candidates.candidate_ids), **candidates._asdict()
    )
    ```

    Reference: Yang et al., "Mixed negative sampling for learning two-tower neural networks in recommendations", WWW
    2020.
    """

    @explains_keywords
    def __init__(
        self,
        sampling_probability: StreamingSamplingProbability,
        num_negatives: int,
        *,
        seed: int | None = None,
        exclude_ids: Any = (),
        **kwargs: Any,
    ) -> None:
        if not isinstance(sampling_probability, StreamingSamplingProbability):
            raise TypeError(
                "`sampling_probability` must be a `StreamingSamplingProbability`. Received: "
                f"sampling_probability={sampling_probability!r} (of type {type(sampling_probability).__name__}). "
                "Create one for the number of candidates, with `counts` if they are known."
            )
        num_negatives = positive_int(num_negatives, "num_negatives")
        excluded = _check_excluded(exclude_ids, sampling_probability.num_candidates)
        # A mixed precision policy would round the probabilities to 16-bit floats.
        kwargs.setdefault("dtype", "float32")
        super().__init__(autocast=False, **kwargs)
        self.sampling_probability = sampling_probability
        self.num_negatives = num_negatives
        self.num_drawn_from = sampling_probability.num_candidates - len(excluded)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.exclude_ids = excluded
        self.supports_masking = True
        self.built = True

    def call(self, candidate_ids: Any, *, candidate_mask: Any = None, training: bool | None = None) -> MixedCandidates:
        """Returns the candidates for the queries of a batch.

        Args:
            candidate_ids: `[batch]` int32, each in [0, `sampling_probability.num_candidates`).
            candidate_mask: `[batch]` bool; False marks padding, which does not count as a draw. `None` if there is no
                padding.
            training: bool, whether to draw negatives and to count the batch in `sampling_probability`.

        Returns:
            `MixedCandidates`: `[batch + num_negatives]` candidates in training, `[batch]` otherwise. The probability of
            an id out of range is NaN.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if the ids are not flat, the mask has another shape, or, outside of compiled functions, an id is
                out of range.
        """
        # This call also checks the shapes, so it comes before the draw.
        in_batch = self.sampling_probability(candidate_ids, candidate_mask=candidate_mask, training=training)
        return self._candidates(candidate_ids, in_batch, candidate_mask, self.draw() if training else None)

    def with_drawn(self, candidate_ids: Any, drawn: Any, candidate_mask: Any = None) -> MixedCandidates:
        """Returns the result of `call` in training, with negatives that `draw` returned earlier.

        This is for models that look up all ids before they know the mask.

        Args:
            candidate_ids: `[batch]` int32, as in `call`.
            drawn: `[num_negatives]` int32, the result of `draw`.
            candidate_mask: `[batch]` bool, as in `call`.

        Returns:
            `MixedCandidates`: `[batch + num_negatives]` candidates.
        """
        in_batch = self.sampling_probability(candidate_ids, candidate_mask=candidate_mask, training=True)
        return self._candidates(candidate_ids, in_batch, candidate_mask, drawn)

    def _candidates(self, candidate_ids: Any, in_batch: Any, candidate_mask: Any, drawn: Any) -> MixedCandidates:
        if candidate_mask is None:
            candidate_mask = ops.ones(ops.shape(candidate_ids), "bool")
        candidate_mask = ops.cast(candidate_mask, "bool")
        if drawn is None:
            return MixedCandidates(candidate_ids, in_batch, candidate_mask)
        ids = ops.concatenate([candidate_ids, drawn])
        # Computed after the batch was counted, so that all probabilities come from the same estimate.
        in_batch = ops.concatenate([in_batch, self.sampling_probability(drawn, training=False)])
        num_in_batch = ops.sum(ops.cast(candidate_mask, "float32"))
        probability = mixed_sampling_probability(
            in_batch, self._uniform_probability(ids), num_in_batch, self.num_negatives
        )
        mask = ops.concatenate([candidate_mask, ops.ones((self.num_negatives,), "bool")])
        return MixedCandidates(ids, probability, mask)

    def draw(self) -> Any:
        """Returns `[num_negatives]` int32 ids, drawn uniformly from the ids that are not excluded."""
        places = keras.random.randint(
            (self.num_negatives,), 0, self.num_drawn_from, dtype="int32", seed=self.seed_generator
        )
        if not self.exclude_ids:
            return places
        # `places` counts only the ids that can be drawn. `below[i]` is the number of such ids below excluded id i: each
        # excluded id with `below[i] <= place` shifts the id of the place by one.
        below = np.array(self.exclude_ids, "int32") - np.arange(len(self.exclude_ids), dtype="int32")
        return ops.add(places, ops.cast(ops.searchsorted(below, places, side="right"), "int32"))

    def _uniform_probability(self, ids: Any) -> Any:
        probability = 1 / self.num_drawn_from
        if not self.exclude_ids:
            return ops.full(ops.shape(ids), probability, "float32")
        excluded = np.array(self.exclude_ids, "int32")
        nearest = ops.minimum(ops.cast(ops.searchsorted(excluded, ids), "int32"), len(excluded) - 1)
        return ops.where(ops.equal(ops.take(excluded, nearest, axis=0), ids), 0.0, probability)

    def compute_output_spec(
        self, candidate_ids: Any, *, candidate_mask: Any = None, training: bool | None = None
    ) -> MixedCandidates:
        """Returns shapes and dtypes. The number of candidates is `None`, because it depends on `training`."""
        return MixedCandidates(*(keras.KerasTensor((None,), dtype=dtype) for dtype in ("int32", "float32", "bool")))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: the mask is one of the outputs."""
        return

    def save_own_variables(self, store: Any) -> None:
        """Saves the state of the random generator to `store`, which Keras does not do."""
        store["draws"] = ops.convert_to_numpy(self.seed_generator.state)

    def load_own_variables(self, store: Any) -> None:
        """Loads the state of the random generator from `store`."""
        self.seed_generator.state.assign(np.asarray(store["draws"]))

    def get_config(self) -> dict[str, Any]:
        """Returns the serialized arguments of the constructor."""
        config: dict[str, Any] = super().get_config()
        config.update(
            sampling_probability=keras.saving.serialize_keras_object(self.sampling_probability),
            num_negatives=self.num_negatives,
            seed=self.seed,
            exclude_ids=list(self.exclude_ids),
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MixedNegatives:
        """Returns the layer that `get_config` describes, without its state."""
        config = dict(config)
        config["sampling_probability"] = keras.saving.deserialize_keras_object(config["sampling_probability"])
        return cls(**config)


def _check_excluded(exclude_ids: Any, num_candidates: int) -> list[int]:
    excluded = check_exclude_ids(exclude_ids)
    outside = [i for i in excluded if not 0 <= i < num_candidates]
    if outside:
        raise ValueError(
            "`exclude_ids` must be ids of candidates. Received: "
            f"{outside[0]} for {num_candidates} candidates with ids 0 to {num_candidates - 1}. Remove that id."
        )
    if len(excluded) == num_candidates:
        raise ValueError(
            "`exclude_ids` must leave at least one candidate to draw. Received: "
            f"{len(excluded)} ids for {num_candidates} candidates. Exclude fewer ids."
        )
    return excluded
