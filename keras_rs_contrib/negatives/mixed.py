"""Negatives drawn from the whole corpus, beside those of the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import positive_int
from keras_rs_contrib.ids import IdArguments, check_exclude_ids
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability


class MixedCandidates(NamedTuple):
    """What `MixedNegatives` returns: arguments of `DistributedTwoTowerTask`.

    Attributes:
        candidate_ids: `[num_candidates]` int32, the batch's own first.
        candidate_sampling_probability: `[num_candidates]` float32.
        candidate_mask: `[num_candidates]` bool, False where there is no candidate.
    """

    candidate_ids: Any
    candidate_sampling_probability: Any
    candidate_mask: Any


def mixed_sampling_probability(
    in_batch_probability: Any, uniform_probability: Any, num_in_batch: Any, num_negatives: Any
) -> Any:
    """Returns the probability of candidates under a mixture of the batch's draws and uniform ones.

    A candidate counts by the mixture whichever of the two it was drawn from, so that neither a popular one among the
    uniform draws nor a rare one in the batch weighs far more than the rest: the balance heuristic of multiple
    importance sampling.

    Args:
        in_batch_probability: float, the probability of each candidate to be a draw of the batch.
        uniform_probability: float, likewise of the uniform draws: one over the size of the corpus.
        num_in_batch: how many draws are the batch's.
        num_negatives: how many draws are uniform.

    Returns:
        float32, the probability of a single one of all draws to be the candidate, shape of `in_batch_probability`; 0
        without draws.

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
    """Adds candidates drawn uniformly from the corpus to those of the batch, as further negatives.

    A batch holds popular candidates and few others: the long tail is hardly ever a negative, and what a tower says of
    it is left to chance. Uniform draws reach it, and the batch's own reach the head. Where a query favours popular
    candidates, the batch alone comes closest to the softmax over the corpus, and where it does not, uniform draws
    alone; half of each is never far from the better, and so the best where there are queries of both kinds.

    The layer returns ids. Look them all up at once, and give embeddings, ids and probabilities to a
    `DistributedTwoTowerTask` with `remove_accidental_hits=True`, for a query's positive may be drawn again.

    Outside of training the layer returns the batch alone, with its in-batch probabilities: nothing is drawn or counted,
    and the loss of an evaluation does not depend on chance.

    Args:
        sampling_probability: a `StreamingSamplingProbability` of the corpus. It belongs to this layer, which shows it
            each batch; call it nowhere else in training, or batches count twice.
        num_negatives: positive int, how many candidates are drawn for each batch, for all of its queries.
        seed: int, of the draws. They are the same on any number of devices.
        exclude_ids: ids that are never drawn, such as that of padding.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if `sampling_probability` is of another type, or ids are no integers.
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

    def __init__(
        self,
        sampling_probability: StreamingSamplingProbability,
        num_negatives: int,
        seed: int | None = None,
        exclude_ids: Any = (),
        **kwargs: Any,
    ) -> None:
        if not isinstance(sampling_probability, StreamingSamplingProbability):
            raise TypeError(
                "`sampling_probability` must be a `StreamingSamplingProbability`. Received: "
                f"sampling_probability={sampling_probability!r} (of type {type(sampling_probability).__name__}). "
                "Make one of the number of candidates, with `counts=` where they are known."
            )
        num_negatives = positive_int(num_negatives, "num_negatives")
        excluded = _check_excluded(exclude_ids, sampling_probability.num_candidates)
        # A mixed precision policy would round the probabilities to 8 bits.
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

    def call(self, candidate_ids: Any, candidate_mask: Any = None, training: bool | None = None) -> MixedCandidates:
        """Returns the candidates that the queries of a batch are scored with.

        Args:
            candidate_ids: `[batch]` int32, each in [0, `num_candidates`) of `sampling_probability`.
            candidate_mask: `[batch]` bool; False marks padding, which is no draw. `None` for none.
            training: whether to draw negatives, and to count the batch for `sampling_probability`.

        Returns:
            `[batch + num_negatives]` candidates in training, and `[batch]` outside of it. The probability of an id out
            of range is NaN.

        Raises:
            TypeError: if ids are no integers.
            ValueError: if the ids are not flat, or the mask has another shape.
        """
        # Also checks the shapes, before anything is drawn.
        in_batch = self.sampling_probability(candidate_ids, candidate_mask=candidate_mask, training=training)
        return self._candidates(candidate_ids, in_batch, candidate_mask, self.draw() if training else None)

    def with_drawn(self, candidate_ids: Any, drawn: Any, candidate_mask: Any = None) -> MixedCandidates:
        """Returns what `call` does in training, with negatives that `draw` has drawn before.

        For a model that looks all ids up before it knows the mask.

        Args:
            candidate_ids: `[batch]` int32, as of `call`.
            drawn: `[num_negatives]` int32.
            candidate_mask: `[batch]` bool, as of `call`.
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
        # Asked only now: the batch counts for these, too.
        in_batch = ops.concatenate([in_batch, self.sampling_probability(drawn, training=False)])
        num_in_batch = ops.sum(ops.cast(candidate_mask, "float32"))
        probability = mixed_sampling_probability(
            in_batch, self._uniform_probability(ids), num_in_batch, self.num_negatives
        )
        mask = ops.concatenate([candidate_mask, ops.ones((self.num_negatives,), "bool")])
        return MixedCandidates(ids, probability, mask)

    def draw(self) -> Any:
        """Returns `[num_negatives]` int32 ids, drawn uniformly."""
        places = keras.random.randint(
            (self.num_negatives,), 0, self.num_drawn_from, dtype="int32", seed=self.seed_generator
        )
        if not self.exclude_ids:
            return places
        # How many candidates that can be drawn lie below each that cannot: beyond as many places, ids shift by one.
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
        self, candidate_ids: Any, candidate_mask: Any = None, training: bool | None = None
    ) -> MixedCandidates:
        """Returns shapes and dtypes. The number of candidates depends on whether it is training, and is open."""
        return MixedCandidates(*(keras.KerasTensor((None,), dtype=dtype) for dtype in ("int32", "float32", "bool")))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: the mask is one of the results."""
        return

    def save_own_variables(self, store: Any) -> None:
        """Puts the state of the draws into `store`, which Keras leaves out."""
        store["draws"] = ops.convert_to_numpy(self.seed_generator.state)

    def load_own_variables(self, store: Any) -> None:
        """Takes the state of the draws from `store`."""
        self.seed_generator.state.assign(np.asarray(store["draws"]))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, serialized."""
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
            f"{outside[0]} for {num_candidates} candidates with ids 0 to {num_candidates - 1}. Drop it."
        )
    if len(excluded) == num_candidates:
        raise ValueError(
            "`exclude_ids` must leave something to draw. Received: "
            f"{len(excluded)} ids for {num_candidates} candidates. Drop some of them."
        )
    return excluded
