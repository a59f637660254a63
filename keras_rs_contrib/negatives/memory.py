"""A memory of recent candidates, used as negatives for later batches."""

from __future__ import annotations

import inspect
import numbers
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rs_contrib.arguments import check_positional, differ, explains_keywords, positive_int
from keras_rs_contrib.distribution import check_layout
from keras_rs_contrib.ids import NO_CANDIDATE, IdArguments

# The variables that hold the stored candidates.
STATE = ("embeddings", "ids", "probabilities", "place", "num_filled")


class MemoryCandidates(NamedTuple):
    """The result of `CrossBatchMemory`. The fields are arguments of `DistributedTwoTowerTask`.

    Attributes:
        candidate_embeddings: `[num_candidates, embedding_dim]` float, those of the batch first.
        candidate_ids: `[num_candidates]` int32, or `None` if not given.
        candidate_sampling_probability: `[num_candidates]` float32, or `None` if not given.
        candidate_mask: `[num_candidates]` bool; False marks padding and empty slots of the memory.
    """

    candidate_embeddings: Any
    candidate_ids: Any
    candidate_sampling_probability: Any
    candidate_mask: Any


@keras.saving.register_keras_serializable(package="keras_rs_contrib")
class CrossBatchMemory(IdArguments, keras.layers.Layer):  # type: ignore[misc]
    """Adds the most recent candidates of earlier batches to the candidates of the batch, as extra negatives.

    After the first steps of training, the embedding of a candidate changes little from one step to the next. The
    layer therefore stores the embeddings of the `capacity` most recent candidates and uses them as negatives, without
    another tower pass and without a gradient. A call with B candidates returns B + `capacity` candidates. The state of
    the layer is a ring buffer, in which new candidates replace the oldest. It holds the embedding and id of each
    candidate, and its sampling probability at the time it was added. The state is saved with the model and replicated
    on all devices.

    In training, the layer returns the candidates of the batch followed by the memory as it was before the batch. It
    then adds the batch to the memory. Outside training, it returns the candidates of the batch only and does not change
    the memory, so the evaluation loss is that of the batch alone.

    With log-q correction, each candidate of the batch and of the memory has its own probability. All of them must be
    the probability of a single draw, as `StreamingSamplingProbability` and `MixedNegatives` return it. The loss then
    equals that of one larger batch. Expected counts in a batch would depend on the batch size: if batches differ in
    size, those of the batch and of the memory are not comparable.

    The memory holds a candidate once for each time it was drawn. Pass ids and let the task remove accidental hits.
    Otherwise the positive of a query may also be one of its negatives.

    Args:
        capacity: positive int, number of candidates to store.
        warmup_steps: int, at least 0, number of training steps in which the memory is filled but not used. At the
            beginning of training, embeddings change fast.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if ids are not integers.
        ValueError: if an argument is out of range, or, in a call, if arguments are inconsistent with each other or with
            earlier batches.

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

    @explains_keywords
    def __init__(self, capacity: int, *, warmup_steps: int = 0, **kwargs: Any) -> None:
        capacity = positive_int(capacity, "capacity")
        if not isinstance(warmup_steps, numbers.Integral) or isinstance(warmup_steps, bool) or warmup_steps < 0:
            raise ValueError(
                "`warmup_steps` must be an int of at least 0. "
                f"Received: warmup_steps={warmup_steps!r}. Use 0 to use the memory from the first step."
            )
        # A mixed precision policy would round the stored embeddings and probabilities.
        kwargs.setdefault("dtype", "float32")
        super().__init__(autocast=False, **kwargs)
        self.capacity: int = capacity
        self.warmup_steps: int = int(warmup_steps)
        self.supports_masking = True
        # Which optional arguments training batches have. The first training batch sets it.
        self._given: dict[str, bool] | None = None

    def build(self, candidate_embeddings_shape: tuple[int | None, ...]) -> None:
        """Creates an empty memory for embeddings of the given shape."""
        embedding_dim = candidate_embeddings_shape[-1]
        path = self.path or self.name
        check_layout(f"{path}/embeddings", (self.capacity, embedding_dim))
        for name in ("ids", "probabilities"):
            check_layout(f"{path}/{name}", (self.capacity,))
        for name in ("place", "num_filled", "steps"):
            check_layout(f"{path}/{name}", ())
        self.embeddings = self._add_state((self.capacity, embedding_dim), "embeddings")
        self.ids = self._add_state((self.capacity,), "ids", "int32", keras.initializers.Constant(NO_CANDIDATE))
        self.probabilities = self._add_state((self.capacity,), "probabilities")
        # The slot of the next candidate, and the number of filled slots.
        self.place = self._add_state((), "place", "int32")
        self.num_filled = self._add_state((), "num_filled", "int32")
        self.steps = self._add_state((), "steps", "int32")

    def _add_state(
        self, shape: tuple[int | None, ...], name: str, dtype: str = "float32", initializer: Any = "zeros"
    ) -> keras.Variable:
        return self.add_weight(shape=shape, initializer=initializer, dtype=dtype, trainable=False, name=name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the shapes before `build` allocates the memory, then calls the layer."""
        check_positional(type(self).call, 1 + len(args))
        bound = inspect.signature(self.call).bind(*args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "training"}
        self._check_shapes({name: _shape(value) for name, value in given.items()})
        return super().__call__(*args, **kwargs)

    def call(
        self,
        candidate_embeddings: Any,
        *,
        candidate_ids: Any = None,
        candidate_sampling_probability: Any = None,
        candidate_mask: Any = None,
        training: bool | None = None,
    ) -> MemoryCandidates:
        """Returns the candidates for the queries of a batch.

        Args:
            candidate_embeddings: `[batch, embedding_dim]` float, including the extra negatives of the batch.
            candidate_ids: `[batch]` int ids, or `None`.
            candidate_sampling_probability: `[batch]` float, the probability of a single draw, or `None`.
            candidate_mask: `[batch]` bool; False marks padding, which is not stored. `None` if there is no padding.
            training: bool, whether to append the memory and then add the batch to it.

        Returns:
            `MemoryCandidates`: `[batch + capacity]` candidates in training, `[batch]` otherwise. Embeddings have the
            dtype of `candidate_embeddings`. Only those of the batch have a gradient.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if shapes are inconsistent, or, in training, if ids or probabilities are given for some batches
                and missing for others.
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
        # Stops at `warmup_steps`, because an unlimited int32 count would eventually overflow.
        self.steps.assign(ops.minimum(ops.add(steps, 1), self.warmup_steps))
        return result

    def _check_shapes(self, shapes: dict[str, Any]) -> None:
        shape = shapes.pop("candidate_embeddings")
        embedding_dim = self.embeddings.shape[-1] if self.built else shape[-1] if shape else None
        if len(shape) != 2 or shape[-1] is None or shape[-1] != embedding_dim:
            expected = "embedding_dim" if embedding_dim is None else embedding_dim
            raise ValueError(
                f"`candidate_embeddings` must have shape (batch, {expected}), with the same dimension in each call. "
                f"Received: shape {shape}. Reshape or project the output of the tower."
            )
        for name, received in shapes.items():
            if received is None:
                continue
            if len(received) != 1 or differ(received[0], shape[0]):
                raise ValueError(
                    f"`{name}` needs one value for each candidate. Received: "
                    f"shape {received} for {shape[0]} candidates. Include the values of the extra negatives."
                )

    def _check_given(self, batch: MemoryCandidates) -> None:
        given = {name: getattr(batch, name) is not None for name in ("candidate_ids", "candidate_sampling_probability")}
        for name, is_given in given.items():
            if self._given is not None and is_given != self._given[name]:
                raise ValueError(
                    f"`{name}` must be given for all training batches or for none, because the memory stores it. "
                    f"Received: {'a batch with it' if is_given else 'a batch without it'}, after batches "
                    f"{'without' if is_given else 'with'} it. Pass it for all batches, or create another "
                    "`CrossBatchMemory`."
                )
        self._given = given

    def compute_output_spec(
        self,
        candidate_embeddings: Any,
        *,
        candidate_ids: Any = None,
        candidate_sampling_probability: Any = None,
        candidate_mask: Any = None,
        training: bool | None = None,
    ) -> MemoryCandidates:
        """Returns shapes and dtypes. The number of candidates is `None`, because it depends on `training`."""
        if candidate_ids is None or candidate_sampling_probability is None:
            raise ValueError(
                "In a functional model, all outputs must be tensors. Received: None for candidate_ids or "
                "candidate_sampling_probability. Pass both, or call the layer in a model's `compute_loss`."
            )
        return MemoryCandidates(
            keras.KerasTensor((None, candidate_embeddings.shape[-1]), dtype=candidate_embeddings.dtype),
            keras.KerasTensor((None,), dtype="int32"),
            keras.KerasTensor((None,), dtype="float32"),
            keras.KerasTensor((None,), dtype="bool"),
        )

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Returns `None`: the mask is one of the outputs."""
        return

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        config: dict[str, Any] = super().get_config()
        config.update(capacity=self.capacity, warmup_steps=self.warmup_steps)
        return config

    def get_build_config(self) -> dict[str, Any]:
        """Returns the embedding dimension, and which optional arguments training batches have."""
        return {"embedding_dim": self.embeddings.shape[-1] if self.built else None, "given": self._given}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Creates the empty memory that `get_build_config` describes."""
        if config["embedding_dim"] is not None:
            self.build((None, config["embedding_dim"]))
            self._given = config["given"]


def _with_memory(batch: MemoryCandidates, memory: dict[str, Any], is_used: Any) -> MemoryCandidates:
    """Returns the candidates of the batch followed by those of the memory.

    Args:
        batch: `[batch]` candidates.
        memory: values of the variables in `STATE`.
        is_used: scalar bool; False masks the candidates of the memory.
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
    """Returns the memory with its oldest candidates replaced by those of the batch.

    Args:
        memory: values of the variables in `STATE`.
        batch: `[batch]` candidates. Masked ones are not stored.
    """
    if batch.candidate_embeddings.shape[0] == 0:
        return memory
    capacity = memory["ids"].shape[0]
    valid = ops.cast(batch.candidate_mask, "int32")
    # Padding takes no slot, so it does not evict real candidates. Of a batch larger than the memory, only the last rows
    # are stored: with two rows for one slot, the result of a scatter is undefined.
    order = ops.subtract(ops.cumsum(valid), 1)
    num_valid = ops.sum(valid)
    is_kept = ops.logical_and(batch.candidate_mask, ops.greater_equal(order, ops.subtract(num_valid, capacity)))
    places = ops.where(is_kept, ops.mod(ops.add(memory["place"], order), capacity), capacity)
    # For each slot, the row of the batch to store there, or -1. Rows that are not stored go to an extra slot at the
    # end, which is cut off.
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
