"""Training, evaluation and prediction on batches of any size, which are checked and filled up."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops
from keras.src.trainers.data_adapters import array_slicing

from keras_rs_contrib import batches
from keras_rs_contrib.guards import StopWhereNoNumber, WeightsKept, no_number, with_callbacks
from keras_rs_contrib.model_inputs import ModelInputs


class PaddedModel(keras.Model):  # type: ignore[misc]
    """Keras's entry points, for a model with an index.

    Subclasses say which batches there are, and keep the index up to date.
    """

    check_inputs: bool

    @property
    def _inputs(self) -> ModelInputs:
        raise NotImplementedError

    @property
    def _ranks_in_evaluation(self) -> bool:
        raise NotImplementedError

    def refresh_index(self) -> None:
        """Brings the index up to date."""
        raise NotImplementedError

    def _check_can_refresh(self) -> None:
        raise NotImplementedError

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | list[int] = 1,
    ) -> keras.callbacks.History:
        """Trains the model: see `keras.Model.fit`.

        Raises:
            ValueError: if a batch is bad, or the loss of an epoch no number; the progress until then is in
                `model.history`.
        """
        x = self._inputs.to_arrays(x, y)
        if class_weight is not None and isinstance(x, dict) and y is None:
            raise ValueError(
                "`class_weight` weighs the classes of `y`. Received: `class_weight`, and y=None. "
                "Pass the labels as `y`, or the weights as `sample_weight`."
            )
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = array_slicing.train_validation_split(
                (x, y, sample_weight), validation_split=validation_split
            )
        shuffle = shuffle and not hasattr(x, "element_spec")
        x = self._inputs.batches(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            steps=steps_per_epoch,
            shuffle=shuffle,
            class_weight=class_weight,
        )
        if validation_data is not None:
            self._check_can_refresh()
            validation_data = self._inputs.batches(
                *keras.utils.unpack_x_y_sample_weight(validation_data),
                batch_size=validation_batch_size or batch_size,
                steps=validation_steps,
            )
        stop = StopWhereNoNumber()
        with WeightsKept(self) as kept:
            history = super().fit(
                x,
                epochs=epochs,
                verbose=verbose,
                callbacks=with_callbacks(callbacks, stop, kept),
                validation_data=validation_data,
                shuffle=False,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_freq=validation_freq,
            )
        if self.check_inputs and stop.found is not None:
            raise ValueError(no_number(self.trainable_variables, *stop.found))
        return history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Returns the loss and the metrics over the whole corpus: see `keras.Model.evaluate`.

        Raises:
            ValueError: if a batch is bad, or the loss no number.
        """
        if self._ranks_in_evaluation:
            self.refresh_index()
        within_fit = kwargs.get("_use_cached_eval_dataset", False)
        if not within_fit:
            x = self._inputs.batches(x, y, sample_weight, batch_size=batch_size, steps=steps)
            with WeightsKept(self) as kept:
                logs = super().evaluate(
                    x, verbose=verbose, steps=steps, callbacks=with_callbacks(callbacks, kept), return_dict=True
                )
        else:
            logs = super().evaluate(x, steps=steps, callbacks=callbacks, return_dict=True, **kwargs)
        if self.check_inputs and not within_fit and not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(no_number(self.trainable_variables, "loss", logs["loss"]))
        return logs if return_dict else self._flatten_metrics_in_order(logs)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Returns the top k of each row, as the index does: see `keras.Model.predict`.

        Args:
            x: batches with the query features; others are left out, but for `exclude_feature`.
            batch_size: as of `keras.Model.predict`, as what follows.
            verbose: likewise.
            steps: likewise.
            callbacks: likewise.

        Returns:
            `(scores, ids)`, `[num_queries, k]` float32 and int32 NumPy arrays, or the ids alone.

        Raises:
            ValueError: if a batch is bad, or the model has no index.
        """
        self.refresh_index()
        x, _, _ = keras.utils.unpack_x_y_sample_weight(x)
        x = self._inputs.batches(x, batch_size=batch_size, steps=steps, queries_only=True)
        with WeightsKept(self) as kept:
            outputs = super().predict(x, verbose=verbose, steps=steps, callbacks=with_callbacks(callbacks, kept))
        is_padded = x.is_padded(len(keras.tree.flatten(outputs)[0]))
        if not is_padded.any():
            return outputs
        return keras.tree.map_structure(lambda output: output[~is_padded], outputs)

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """Trains on one batch: see `keras.Model.train_on_batch`."""
        if class_weight is not None:
            raise ValueError(
                "`class_weight` is not supported on single batches. Received: one. Pass the weights as `sample_weight`."
            )
        x, y, sample_weight = self._inputs.batch(x, y, sample_weight)
        return super().train_on_batch(x, y, sample_weight, return_dict=return_dict)

    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """Evaluates one batch: see `keras.Model.test_on_batch`."""
        self.refresh_index()
        x, y, sample_weight = self._inputs.batch(x, y, sample_weight)
        return super().test_on_batch(x, y, sample_weight, return_dict=return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """Returns the top k of one batch: see `predict`."""
        self.refresh_index()
        num_rows = batches.batch_length(x)
        x, _, _ = self._inputs.batch(x, queries_only=True)
        return keras.tree.map_structure(lambda output: output[:num_rows], super().predict_on_batch(x))

    def _update_metrics_variables(
        self, metrics_variables: Any, unscaled_loss: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any
    ) -> tuple[dict[str, Any], list[Any]]:
        # As in Keras, but that the loss of a batch, a mean, weighs as many rows as it is the mean of.
        mapping = list(zip(self.metrics_variables, metrics_variables, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            if sample_weight is None:
                num_rows = batches.batch_length(x)
            else:
                num_rows = ops.sum(ops.cast(batches.is_present(sample_weight), "float32"))
            self._loss_tracker.update_state(unscaled_loss, sample_weight=num_rows)
            logs = self.compute_metrics(x, y, y_pred, sample_weight)
        values = [scope.get_current_value(variable) for variable in self.metrics_variables]
        return logs, [old if new is None else new for new, old in zip(values, metrics_variables, strict=True)]
