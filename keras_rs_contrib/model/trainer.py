"""Training, evaluation and prediction on batches of any size, which are checked and padded."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_rs_contrib import _keras, batches, columns, processes
from keras_rs_contrib.arguments import check_can_train
from keras_rs_contrib.columns import names_in, select
from keras_rs_contrib.distribution import check_mesh
from keras_rs_contrib.model.access import Access, alone
from keras_rs_contrib.model.added_callbacks import Collect, RefreshIndex, releasing, with_callbacks
from keras_rs_contrib.model.baseline import check_seen, report_popularity, say_that_seen_are_ranked
from keras_rs_contrib.model.callbacks import set_modes
from keras_rs_contrib.model.callbacks_in_step import callbacks_in_step
from keras_rs_contrib.model.failed_builds import RecoveringModel
from keras_rs_contrib.model.feature_names import is_missing
from keras_rs_contrib.model.finite_loss import StopIfNotFinite, no_embedding, not_finite, row_not_finite
from keras_rs_contrib.model.inputs import Purpose
from keras_rs_contrib.model.row_rates import with_row_rates
from keras_rs_contrib.model.training_data import TrainingData
from keras_rs_contrib.model.weight_guard import WeightGuard, own_values


class PaddedModel(RecoveringModel):
    """Keras's entry points for a model with an index: batches are checked and padded, and the index is refreshed.

    Attributes:
        model_inputs: how batches are checked, and the index. A property of a subclass, derived from its layers.
        query_tower: embeds queries.
        candidate_tower: embeds candidates.
        retrieval: the index, or `None`.
        corpus_metrics: metrics of ranks that `evaluate` computes.
        check_inputs: whether batches and losses are checked.
        exclude_seen: whether lists leave out what a query has seen, if that is known.
    """

    query_tower: keras.layers.Layer
    candidate_tower: keras.layers.Layer
    retrieval: Any
    corpus_metrics: list[Any]
    check_inputs: bool
    exclude_seen: bool
    _access: Access
    _training_data: TrainingData
    _has_said_that_seen_are_ranked = False
    _validation_batches: batches.PaddedBatches | None = None
    # Whether `call` retrieves candidates, although a batch may have the features of both towers.
    _is_retrieving = False
    predict_function: Any

    @property
    def ranks_in_evaluation(self) -> bool:
        """Whether `evaluate` ranks candidates in the whole corpus."""
        return (
            self.model_inputs.retrieval is not None
            and self.model_inputs.names.candidate_id is not None
            and bool(self.corpus_metrics)
        )

    @property
    def is_built(self) -> bool:
        """Whether the layers that retrieve have their weights."""
        layers = (self.query_tower, self.candidate_tower, self.retrieval)
        return all(layer is None or layer.built for layer in layers)

    @property
    def lacks_values(self) -> bool:
        """Whether Keras has taken the values out of the variables, and not put others in their place."""
        if not self.is_built or _keras.is_in_stateless_scope():
            return False
        return not all(map(_keras.has_value, self.query_tower.variables))

    def _leaves_out_seen(self, exclude_seen: bool | None) -> bool:
        """Returns whether lists leave out what a query has seen, as an argument says, or by default the model."""
        return self.exclude_seen if exclude_seen is None else exclude_seen

    def _evaluation(self, exclude_seen: bool | None = None) -> Purpose:
        """Returns the purpose of batches for an evaluation."""
        return Purpose(leaves_out_seen=self._leaves_out_seen(exclude_seen), ranks=self.ranks_in_evaluation)

    def refresh_index(self) -> None:
        """Refreshes the index of a feature tower, if the tower has changed since.

        Raises:
            ValueError: if the tower has changed in a loaded model, whose index does not hold the tower's inputs.
        """
        if self.retrieval is not None and self.retrieval.may_be_stale:
            with self._access.alone("refresh"):
                self.retrieval.refresh_if_stale()

    @alone
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
        *,
        seen: Any = None,
    ) -> keras.callbacks.History:
        """Trains the model: see `keras.Model.fit`, and below for `seen`.

        If there are validation metrics over the corpus, those of popularity are printed next to them after training.

        Args:
            x: as in `keras.Model.fit`, like all arguments up to `validation_freq`.
            y: see there.
            batch_size: see there.
            epochs: see there.
            verbose: see there.
            callbacks: see there.
            validation_split: see there.
            validation_data: see there.
            shuffle: see there.
            class_weight: see there.
            sample_weight: see there.
            initial_epoch: see there.
            steps_per_epoch: see there.
            validation_steps: see there.
            validation_batch_size: see there.
            validation_freq: see there.
            seen: what each query has seen, such as the films that a user has rated: `"training"` for the candidates of
                its rows in the training data, or a dict or DataFrame with the features `query_id` and `candidate_id`.
                The model keeps it and leaves these candidates out of the lists of the query. `None` adds nothing.

        Raises:
            TypeError: if `seen` is not of this form.
            ValueError: if a batch is invalid, the model has no `query_id` or `candidate_id` for `seen`, or the loss of
                an epoch is not finite. `model.history` still holds the epochs up to the error.
        """
        check_can_train("`fit`")
        verbose = processes.verbosity(verbose)
        with processes.failing_alike():
            set_modes(callbacks, self.corpus_metrics)
            inputs = self.model_inputs
            seen_pairs = check_seen(seen, inputs)
            inputs.vocabularies.skipped.reset()
            validation_inputs = inputs
            if isinstance(x, dict) or columns.is_frame(x):
                x, y, sample_weight = inputs.to_arrays(x, y, sample_weight)
                inputs = inputs.of_rows
            if class_weight is not None and isinstance(x, dict) and y is None:
                raise ValueError(
                    "`class_weight` weighs the classes of `y`. Received: `class_weight`, and y=None. "
                    "Pass the labels as `y`, or the weights as `sample_weight`."
                )
            if validation_split and validation_data is None:
                (x, y, sample_weight), validation_data = batches.split_off_validation(
                    (x, y, sample_weight), validation_split
                )
                validation_inputs = inputs
            shuffle = shuffle and not hasattr(x, "element_spec")
            x = inputs.batches(
                x,
                y,
                sample_weight,
                Purpose(collects=True),
                batch_size=batch_size,
                steps=steps_per_epoch,
                shuffle=shuffle,
                class_weight=class_weight,
            )
            if validation_data is not None:
                if self.model_inputs.retrieval is not None and self.ranks_in_evaluation:
                    self.model_inputs.retrieval.check_can_refresh()
                validation_data = validation_inputs.batches(
                    *keras.utils.unpack_x_y_sample_weight(validation_data),
                    purpose=self._evaluation(),
                    batch_size=validation_batch_size or batch_size,
                    steps=validation_steps,
                )
            check_mesh(self.variables)
        for pairs in processes.gather(seen_pairs) if processes.have_own_data() else [seen_pairs]:
            if pairs is not None:
                self._training_data.add_seen(*pairs)
        collecting = Collect(self._training_data, seen=isinstance(seen, str), is_partial=steps_per_epoch is not None)
        if validation_data is not None and verbose and seen is None and self.ranks_in_evaluation:
            say_that_seen_are_ranked(self)
        stop = StopIfNotFinite()
        # `evaluate` needs to know the batches that are checked already.
        checked = self._setting(_validation_batches=validation_data)
        with collecting, WeightGuard(self) as guard, checked, releasing(callbacks), callbacks_in_step(callbacks):
            history = super().fit(
                x,
                epochs=epochs,
                verbose=verbose,
                callbacks=with_callbacks(with_row_rates(self, callbacks), RefreshIndex(), stop, guard, collecting),
                validation_data=validation_data,
                shuffle=False,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_freq=validation_freq,
            )
        if self.check_inputs and stop.found is not None:
            raise ValueError(self._not_finite(*stop.found, x))
        self.model_inputs.vocabularies.skipped.warn()
        if validation_data is not None and self.ranks_in_evaluation:
            report_popularity(self, validation_data, validation_steps, history.history, verbose)
        return history

    @alone
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
        *,
        exclude_seen: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the loss and the metrics over the whole corpus: see `keras.Model.evaluate`.

        Args:
            x: as in `keras.Model.evaluate`, like all arguments up to `return_dict`.
            y: see there.
            batch_size: see there.
            verbose: see there.
            sample_weight: see there.
            steps: see there.
            callbacks: see there.
            return_dict: see there.
            exclude_seen: whether the lists leave out what queries have seen, except for the candidate that is ranked.
                By default, `exclude_seen` of the model.
            **kwargs: other arguments of `keras.Model.evaluate`.

        Raises:
            ValueError: if a batch is invalid, or the loss is not finite.
        """
        within_fit = x is not None and x is self._validation_batches
        if within_fit:
            self._training_data.settle()
            return super().evaluate(x, steps=steps, callbacks=callbacks, return_dict=return_dict, **kwargs)
        self.model_inputs.vocabularies.skipped.reset()
        purpose = self._evaluation(exclude_seen)
        with processes.failing_alike():
            x = self.model_inputs.batches(x, y, sample_weight, purpose, batch_size=batch_size, steps=steps)
            check_mesh(self.variables)
        with x.raising_own_errors(), WeightGuard(self) as guard, callbacks_in_step(callbacks):
            logs = super().evaluate(
                x,
                verbose=processes.verbosity(verbose),
                steps=steps,
                callbacks=with_callbacks(callbacks, RefreshIndex(), guard),
                return_dict=return_dict,
                **kwargs,
            )
        # Keras returns a dict, a list that begins with the loss, or only the loss.
        loss = logs.get("loss", 0.0) if isinstance(logs, dict) else logs[0] if isinstance(logs, list) else logs
        if self.check_inputs and not math.isfinite(loss):
            raise ValueError(self._not_finite("loss", loss, None, x))
        self.model_inputs.vocabularies.skipped.warn()
        return logs

    @alone
    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Returns the top k of each row, in the form of the index: see `keras.Model.predict`.

        Args:
            x: batches with the query features, and `exclude_feature`; others are ignored.
            batch_size: as in `keras.Model.predict`.
            verbose: as in `keras.Model.predict`.
            steps: as in `keras.Model.predict`.
            callbacks: as in `keras.Model.predict`.

        Returns:
            `(scores, ids)`, `[num_queries, k]` float32 and int32 NumPy arrays, or only the ids.

        Raises:
            ValueError: if a batch is invalid, or the model has no index.
        """
        verbose = processes.verbosity(verbose)
        with processes.failing_alike():
            x, _, _ = keras.utils.unpack_x_y_sample_weight(x)
            x = self.model_inputs.batches(x, None, None, Purpose(queries_only=True), batch_size=batch_size, steps=steps)
            check_mesh(self.variables)
        setting = self._setting(_is_retrieving=True)
        with x.raising_own_errors(), WeightGuard(self) as guard, setting, callbacks_in_step(callbacks):
            callbacks = with_callbacks(callbacks, RefreshIndex(), guard)
            outputs = super().predict(x, verbose=verbose, steps=steps, callbacks=callbacks)
            self._check_predictions(outputs, x)
        is_padding = x.is_padding(len(keras.tree.flatten(outputs)[0]))
        if is_padding.any():
            outputs = keras.tree.map_structure(lambda output: output[~is_padding], outputs)
        return outputs

    @alone
    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """Trains on one batch: see `keras.Model.train_on_batch`."""
        check_can_train("`train_on_batch`")
        if class_weight is not None:
            raise ValueError(
                "`class_weight` is not supported for single batches. Received: one. Pass weights as `sample_weight`."
            )
        x, y, sample_weight = self.model_inputs.batch(x, y, sample_weight)
        check_mesh(self.variables)
        own_values(self)
        self.reset_metrics()
        return super().train_on_batch(x, _keras.distributable_targets(y), sample_weight, return_dict=return_dict)

    @alone
    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """Evaluates one batch: see `keras.Model.test_on_batch`."""
        self.refresh_index()
        x, y, sample_weight = self.model_inputs.batch(x, y, sample_weight, self._evaluation())
        check_mesh(self.variables)
        # Keras resets the metrics itself from 3.15 on.
        self.reset_metrics()
        return super().test_on_batch(x, _keras.distributable_targets(y), sample_weight, return_dict=return_dict)

    @alone
    def predict_on_batch(self, x: Any) -> Any:
        """Returns the top k of one batch: see `predict`."""
        self.refresh_index()
        data = x
        if processes.num_processes() > 1:
            # Keras does not distribute this batch.
            return self.predict(x, batch_size=len(next(iter(x.values()))), verbose=0)
        x, _, sample_weight = self.model_inputs.batch(x, purpose=Purpose(queries_only=True))
        check_mesh(self.variables)
        with self._setting(_is_retrieving=True):
            outputs = super().predict_on_batch(x)
        is_present = sample_weight != 0
        outputs = keras.tree.map_structure(lambda output: np.asarray(output)[is_present], outputs)
        if any(np.isnan(output).any() for output in keras.tree.flatten(outputs)):
            # Names the row.
            self.predict(data, batch_size=len(is_present), verbose=0)
        return outputs

    def make_predict_function(self, force: bool = False) -> None:
        """Creates the function of a step of `predict`: see `keras.Model.make_predict_function`."""
        is_new = self.predict_function is None or force
        super().make_predict_function(force)
        if not is_new or processes.num_processes() == 1:
            return
        predict_step = self.predict_function

        def step_on_host(state: Any, iterator: Any) -> tuple[Any, Any]:
            outputs, state = predict_step(state, iterator)
            own = processes.own_rows if processes.have_own_data() else processes.to_host
            return keras.tree.map_structure(own, outputs), state

        self.predict_function = step_on_host

    def _not_finite(self, name: str, loss: float, epoch: int | None, read: batches.PaddedBatches) -> str:
        """Returns the error message for a loss that is not finite, after batches were read."""
        seen = f"{name}={loss}" if epoch is None else f"{name}={loss} in epoch {epoch + 1}"
        found = self._row_without_embedding(read, ("query", "candidate"))
        return not_finite(self.trainable_variables, seen) if found is None else no_embedding(*found, f"{seen}, and ")

    def _row_without_embedding(
        self, read: batches.PaddedBatches, kinds: tuple[str, ...]
    ) -> tuple[str, str, dict[str, Any]] | None:
        """Returns the kind, the place and the features of the first row whose embedding is not finite, or `None`."""
        names = self.model_inputs.names
        towers = {"query": (self.query_tower, names.query), "candidate": (self.candidate_tower, names.candidate)}
        with contextlib.suppress(ValueError):
            # A generator cannot be read again.
            for number, (features, _, sample_weight) in zip(range(len(read.sizes)), read.unshuffled(), strict=False):
                for kind in kinds:
                    tower, used = towers[kind]
                    row = row_not_finite(tower, select(features, used), sample_weight)
                    if row is not None:
                        values = {each: np.asarray(features[each])[row] for each in names_in(used)}
                        values = self.model_inputs.vocabularies.named(values)
                        return kind, f"row {row} of batch {number}", values
        return None

    def _check_predictions(self, outputs: Any, read: batches.PaddedBatches) -> None:
        scores = [output for output in keras.tree.flatten(outputs) if np.issubdtype(output.dtype, np.floating)]
        if self.check_inputs and any(np.isnan(output).any() for output in scores):
            found = self._row_without_embedding(read, ("query",))
            if found is not None:
                raise ValueError(no_embedding(*found))

    @contextlib.contextmanager
    def _setting(self, **attributes: Any) -> Iterator[None]:
        """Sets attributes within `with`, hidden from Keras's attribute tracking."""
        before = {name: getattr(self, name) for name in attributes}
        for name, value in attributes.items():
            object.__setattr__(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                object.__setattr__(self, name, value)

    def compute_loss_and_updates(
        self,
        trainable_variables: Any,
        non_trainable_variables: Any,
        metrics_variables: Any,
        x: Any,
        y: Any,
        sample_weight: Any,
        training: bool = False,
        optimizer_variables: Any = None,
    ) -> Any:
        """Computes the loss of a batch without side effects: see `keras.Model`."""
        return super().compute_loss_and_updates(
            trainable_variables,
            non_trainable_variables,
            metrics_variables,
            x,
            None if is_missing(y) else y,
            sample_weight,
            training=training,
            optimizer_variables=optimizer_variables,
        )
