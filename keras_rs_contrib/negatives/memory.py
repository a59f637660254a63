"""Candidates of earlier batches, kept as negatives for later ones."""

from __future__ import annotations

import inspect
import numbers
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import differ, positive_int
from keras_rs_contrib.ids import NO_CANDIDATE, IdArguments

# The variables of a memory.
STATE = ("embeddings", "ids", "probabilities", "place", "num_filled")


class MemoryCandidates(NamedTuple):
    """What `CrossBatchMemory` returns: arguments of `DistributedTwoTowerTask`.

    Attributes:
        candidate_embeddings: `[num_candidates, embedding_dim]` float, the batch's own first.
        candidate_ids: `[num_candidates]` int32, or `None` where none were given.
        candidate_sampling_probability: `[num_candidates]` float32, or `None` where none were given.
        candidate_mask: `[num_candidates]` bool, False where there is no candidate.
    """

    candidate_embeddings: Any
    candidate_ids: Any
    candidate_sampling_probability: Any
    candidate_mask: Any


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class CrossBatchMemory(IdArguments, keras.layers.Layer):  # type: ignore[misc]
    """Adds the candidates of the latest batches to those of this one, as further negatives.

    What a tower says of a candidate changes little from one step to the next, once it has settled. So the embeddings of
    the last `capacity` candidates, as they were when they passed by, serve as negatives that need no tower and no
    gradient: a batch of B queries then has B + `capacity` candidates. They are kept as the layer's state, in a ring
    in which the latest replace the oldest, with their ids, and with the sampling probability that each had when it
    came. The state is saved with the model, and each device holds all of it.

    Called in training, the layer returns the batch's candidates followed by the memory as it was before the batch, and
    then puts the batch in. Outside of training it returns the batch's candidates alone, and the memory stays as it is:
    the loss of an evaluation is that of the batch.

    With log-q correction each candidate, of the batch or of the memory, has its own probability. All must be on one
    scale, the probability of a single draw, as `StreamingSamplingProbability` and `MixedNegatives` give it: the loss
    is then that of one larger batch. Probabilities of another scale, such as expected counts in a batch, would shift
    the two parts against one another as soon as batches differ in size.

    MemoryCandidates recur in the memory as often as they were drawn. Give ids, and let the task remove accidental hits, or
    the positives of a batch will stand among its negatives.

    Args:
        capacity: positive int, how many candidates are kept.
        warmup_steps: for so many steps of training the memory is filled and not used yet, since a tower that has just
            begun to learn changes fast.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if ids are no integers.
        ValueError: if an argument is out of range, or, when called, if arguments do not fit one another or what was
            given before.

    Example:
    ```python
    memory = CrossBatchMemory(capacity=8)
    task = DistributedTwoTowerTask(remove_accidental_hits=True)
    for step in range(3):
        query_embeddings = keras.random.normal((4, 2), seed=step)
        candidates = memory(query_embeddings + 0.1, candidate_ids=np.arange(4) + step, training=True)
        loss = task(query_embeddings, **candidates._asdict())  # each query has 12 candidates
    ```

    Reference: Wang et al., "Cross-batch negative sampling for training two-tower recommenders", SIGIR 2021.
    """

    def __init__(self, capacity: int, warmup_steps: int = 0, **kwargs: Any) -> None:
        capacity = positive_int(capacity, "capacity")
        if not isinstance(warmup_steps, numbers.Integral) or isinstance(warmup_steps, bool) or warmup_steps < 0:
            raise ValueError(
                "`warmup_steps` must be a number of steps, 0 or more. "
                f"Received: warmup_steps={warmup_steps!r}. Use 0 to begin at once."
            )
        # A mixed precision policy would round what is kept.
        kwargs.setdefault("dtype", "float32")
        super().__init__(autocast=False, **kwargs)
        self.capacity: int = capacity
        self.warmup_steps: int = int(warmup_steps)
        self.supports_masking = True
        # Which of the optional arguments come with each batch; known from the first one in training.
        self._given: dict[str, bool] | None = None

    def build(self, candidate_embeddings_shape: tuple[int | None, ...]) -> None:
        """Makes the memory for embeddings of a shape, empty."""
        embedding_dim = candidate_embeddings_shape[-1]
        self.embeddings = self._add_state((self.capacity, embedding_dim), "embeddings")
        self.ids = self._add_state((self.capacity,), "ids", "int32", keras.initializers.Constant(NO_CANDIDATE))
        self.probabilities = self._add_state((self.capacity,), "probabilities")
        # Where the next row goes, and how many rows are filled.
        self.place = self._add_state((), "place", "int32")
        self.num_filled = self._add_state((), "num_filled", "int32")
        self.steps = self._add_state((), "steps", "int32")

    def _add_state(
        self, shape: tuple[int | None, ...], name: str, dtype: str = "float32", initializer: Any = "zeros"
    ) -> keras.Variable:
        return self.add_weight(shape=shape, initializer=initializer, dtype=dtype, trainable=False, name=name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the shapes before `build` allocates the memory for them, and calls the layer."""
        bound = inspect.signature(self.call).bind(*args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "training"}
        self._check_shapes({name: _shape(value) for name, value in given.items()})
        return super().__call__(*args, **kwargs)

    def call(
        self,
        candidate_embeddings: Any,
        candidate_ids: Any = None,
        candidate_sampling_probability: Any = None,
        candidate_mask: Any = None,
        training: bool | None = None,
    ) -> MemoryCandidates:
        """Returns the candidates that the queries of a batch are scored with.

        Args:
            candidate_embeddings: `[batch, embedding_dim]` float, extra negatives of the batch included.
            candidate_ids: `[batch]` integers, or `None`.
            candidate_sampling_probability: `[batch]` float, the probability of a single draw, or `None`.
            candidate_mask: `[batch]` bool; False marks padding, which is not kept. `None` for none.
            training: whether to add the memory, and to put the batch in.

        Returns:
            `[batch + capacity]` candidates in training, and `[batch]` outside of it. Embeddings have the dtype of
            `candidate_embeddings`; the gradient flows to the batch's alone.

        Raises:
            TypeError: if ids are no integers.
            ValueError: if shapes differ, or, in training, if ids or probabilities are given and were not before, or
                the other way round.
        """
        if candidate_sampling_probability is not None:
            candidate_sampling_probability = ops.cast(candidate_sampling_probability, "float32")
        if candidate_mask is None:
            candidate_mask = ops.ones(ops.shape(candidate_embeddings)[:1], "bool")
        candidate_mask = ops.cast(candidate_mask, "bool")
        batch = MemoryCandidates(candidate_embeddings, candidate_ids, candidate_sampling_probability, candidate_mask)
        if not training:
            return batch
        self._check_given(batch)
        memory = {name: ops.convert_to_tensor(getattr(self, name)) for name in STATE}
        steps = ops.convert_to_tensor(self.steps)
        result = _with_memory(batch, memory, ops.greater_equal(steps, self.warmup_steps))
        for name, value in _with_batch(memory, batch).items():
            getattr(self, name).assign(value)
        # Counts no further than is needed: an int32 would wrap around in the end.
        self.steps.assign(ops.minimum(ops.add(steps, 1), self.warmup_steps))
        return result

    def _check_shapes(self, shapes: dict[str, Any]) -> None:
        shape = shapes.pop("candidate_embeddings")
        embedding_dim = self.embeddings.shape[-1] if self.built else shape[-1] if shape else None
        if len(shape) != 2 or shape[-1] is None or shape[-1] != embedding_dim:
            expected = "embedding_dim" if embedding_dim is None else embedding_dim
            raise ValueError(
                f"`candidate_embeddings` must have shape (batch, {expected}), the same dimension at each call. "
                f"Received: shape {shape}. Flatten or project the output of the tower."
            )
        for name, received in shapes.items():
            if received is None:
                continue
            if len(received) != 1 or differ(received[0], shape[0]):
                raise ValueError(
                    f"`{name}` needs one value for each candidate. Received: "
                    f"shape {received} for {shape[0]} candidates. Include those of the extra negatives."
                )

    def _check_given(self, batch: MemoryCandidates) -> None:
        given = {name: getattr(batch, name) is not None for name in ("candidate_ids", "candidate_sampling_probability")}
        for name, is_given in given.items():
            if self._given is not None and is_given != self._given[name]:
                raise ValueError(
                    f"`{name}` must be given for every batch of training, or for none: what is kept has it or lacks "
                    f"it. Received: {'a batch with it' if is_given else 'a batch without it'}, after batches "
                    f"{'without' if is_given else 'with'}. Pass it always, or make another `CrossBatchMemory`."
                )
        self._given = given

    def compute_output_spec(
        self,
        candidate_embeddings: Any,
        candidate_ids: Any = None,
        candidate_sampling_probability: Any = None,
        candidate_mask: Any = None,
        training: bool | None = None,
    ) -> MemoryCandidates:
        """Returns shapes and dtypes. The number of candidates depends on whether it is training, and is open."""
        if candidate_ids is None or candidate_sampling_probability is None:
            raise ValueError(
                "In a functional model all results must be tensors. Received: candidate_ids or "
                "candidate_sampling_probability of None. Give both, or call the layer in a model's `compute_loss`."
            )
        return MemoryCandidates(
            keras.KerasTensor((None, candidate_embeddings.shape[-1]), dtype=candidate_embeddings.dtype),
            keras.KerasTensor((None,), dtype="int32"),
            keras.KerasTensor((None,), dtype="float32"),
            keras.KerasTensor((None,), dtype="bool"),
        )

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: the mask is one of the results."""
        return

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config: dict[str, Any] = super().get_config()
        config.update(capacity=self.capacity, warmup_steps=self.warmup_steps)
        return config

    def get_build_config(self) -> dict[str, Any]:
        """Returns what the weights' shapes and meaning depend on."""
        return {"embedding_dim": self.embeddings.shape[-1] if self.built else None, "given": self._given}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Makes the memory that `get_build_config` describes, empty."""
        if config["embedding_dim"] is not None:
            self.build((None, config["embedding_dim"]))
            self._given = config["given"]


def _with_memory(batch: MemoryCandidates, memory: dict[str, Any], is_used: Any) -> MemoryCandidates:
    """Returns the candidates of the batch and of the memory.

    Args:
        batch: `[batch]` candidates.
        memory: the values of `STATE`.
        is_used: bool; where False, the candidates of the memory are masked.
    """
    kept = ops.cast(ops.stop_gradient(memory["embeddings"]), batch.candidate_embeddings.dtype)
    is_filled = ops.less(ops.arange(memory["ids"].shape[0], dtype="int32"), memory["num_filled"])
    ids, probabilities = batch.candidate_ids, batch.candidate_sampling_probability
    return MemoryCandidates(
        ops.concatenate([batch.candidate_embeddings, kept]),
        None if ids is None else ops.concatenate([ids, memory["ids"]]),
        None if probabilities is None else ops.concatenate([probabilities, memory["probabilities"]]),
        ops.concatenate([batch.candidate_mask, ops.logical_and(is_filled, is_used)]),
    )


def _with_batch(memory: dict[str, Any], batch: MemoryCandidates) -> dict[str, Any]:
    """Returns the memory with the batch's candidates in place of the oldest.

    Args:
        memory: the values of `STATE`.
        batch: `[batch]` candidates, of which those outside the mask are left out.
    """
    if batch.candidate_embeddings.shape[0] == 0:
        return memory
    capacity = memory["ids"].shape[0]
    valid = ops.cast(batch.candidate_mask, "int32")
    # Padding takes no place, for it would push real candidates out. Of a batch that is too large, the last rows stay.
    # Two rows for one place would leave to the device which of them it takes.
    order = ops.subtract(ops.cumsum(valid), 1)
    num_valid = ops.sum(valid)
    is_kept = ops.logical_and(batch.candidate_mask, ops.greater_equal(order, ops.subtract(num_valid, capacity)))
    places = ops.where(is_kept, ops.mod(ops.add(memory["place"], order), capacity), capacity)
    # For each place of the memory, the row of the batch that goes there; the one place too many takes what is left out.
    rows = ops.scatter_update(
        ops.full((capacity + 1,), -1, "int32"),
        ops.expand_dims(places, 1),
        ops.arange(ops.shape(valid)[0], dtype="int32"),
    )[:capacity]
    is_new, rows = ops.greater_equal(rows, 0), ops.maximum(rows, 0)

    def replaced(old: Any, new: Any) -> Any:
        new = ops.take(ops.cast(ops.stop_gradient(new), old.dtype), rows, axis=0)
        return ops.where(ops.reshape(is_new, (capacity, *[1] * (len(old.shape) - 1))), new, old)

    result = {"embeddings": replaced(memory["embeddings"], batch.candidate_embeddings)}
    if batch.candidate_ids is not None:
        result["ids"] = replaced(memory["ids"], batch.candidate_ids)
    if batch.candidate_sampling_probability is not None:
        result["probabilities"] = replaced(memory["probabilities"], batch.candidate_sampling_probability)
    result["place"] = ops.mod(ops.add(memory["place"], num_valid), capacity)
    result["num_filled"] = ops.minimum(ops.add(memory["num_filled"], num_valid), capacity)
    return result


def _shape(value: Any) -> tuple[int | None, ...] | None:
    return None if value is None else tuple(value.shape if hasattr(value, "shape") else np.shape(value))
