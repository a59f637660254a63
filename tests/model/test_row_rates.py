"""The learning rates of row optimizers follow that of the optimizer of `compile`."""

import keras
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import LazyAdam, RowAdagrad, RowSGD, RowSparseEmbedding, TwoTowerModel

NUM_USERS, NUM_MOVIES, DIMENSION = 13, 17, 4
RNG = np.random.default_rng(0)
FEATURES = {"user": RNG.integers(0, NUM_USERS, 48), "movie": RNG.integers(0, NUM_MOVIES, 48)}
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.2, 5, 0.5)


def model_of(user=None, movie=None, rate=0.2, optimizer=keras.optimizers.SGD):
    """Returns a model whose towers are plain embeddings, or trained by row optimizers."""
    keras.utils.set_random_seed(0)

    def tower(num_rows, row_optimizer, name):
        initializer = keras.initializers.RandomUniform(-1, 1, seed=num_rows)
        if row_optimizer is None:
            return keras.layers.Embedding(num_rows, DIMENSION, initializer, name=name)
        return RowSparseEmbedding(num_rows, DIMENSION, row_optimizer, initializer, name=name)

    model = TwoTowerModel(tower(NUM_USERS, user, "user"), tower(NUM_MOVIES, movie, "movie"), "user", "movie")
    model.compile(optimizer(rate))
    return model


def fit(model, *callbacks, epochs=5, **arguments):
    arguments = {"batch_size": 16, "shuffle": False, "verbose": 0, **arguments}
    return model.fit(FEATURES, epochs=epochs, callbacks=list(callbacks), **arguments).history["loss"]


def rate_of(optimizer_or_layer):
    return float(keras.ops.convert_to_numpy(optimizer_or_layer.learning_rate))


class Record(keras.callbacks.Callback):
    """Notes the rates at the end of each epoch: of the optimizer, and of the rows."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_epoch_end(self, epoch, logs=None):
        layers = (self.model.query_tower, self.model.candidate_tower)
        rows = [rate_of(layer) for layer in layers if isinstance(layer, RowSparseEmbedding)]
        self.rates.append([rate_of(self.model.optimizer), *rows])


class OnTrainBegin(keras.callbacks.Callback):
    """Sets a rate once."""

    def on_train_begin(self, logs=None):
        self.model.optimizer.learning_rate = 0.05


class WarmUpByBatch(keras.callbacks.Callback):
    """Sets a rate for each batch, from 0 on."""

    def __init__(self):
        super().__init__()
        self.num_batches = 0

    def on_train_batch_begin(self, batch, logs=None):
        # Keras keeps the state of the epoch outside of the variables.
        self.model.jax_state_sync()
        self.model.optimizer.learning_rate = 0.02 * self.num_batches
        self.num_batches += 1


class AfterBatches(keras.callbacks.Callback):
    """Halves the rate after each batch."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.jax_state_sync()
        self.model.optimizer.learning_rate = rate_of(self.model.optimizer) / 2


CALLBACKS = {
    "absolute rates from the first epoch on": lambda: keras.callbacks.LearningRateScheduler(lambda e: 0.1 * 0.5**e),
    "rates relative to the last": lambda: keras.callbacks.LearningRateScheduler(lambda e, rate: rate * 0.7),
    "from 0 and through 0": lambda: keras.callbacks.LearningRateScheduler(lambda e: [0.0, 0.2, 0.1, 0.0, 0.3][e]),
    "plateau": lambda: keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=10.0),
    "on_train_begin": OnTrainBegin,
    "on_train_batch_begin": WarmUpByBatch,
    "on_train_batch_end": AfterBatches,
}


@pytest.mark.parametrize(
    ("optimizer", "name"), [*(("sgd", name) for name in CALLBACKS), ("adagrad", "from 0 and through 0")]
)
def test_training_matches_plain_embeddings_of_the_same_rate(optimizer, name):
    kind, rows = {"sgd": (keras.optimizers.SGD, RowSGD), "adagrad": (keras.optimizers.Adagrad, RowAdagrad)}[optimizer]
    plain = model_of(optimizer=kind)
    expected = fit(plain, CALLBACKS[name]())
    constant = fit(model_of(optimizer=kind))
    assert not np.allclose(expected, constant, rtol=1e-4)
    # All rows, some, and a plain table beside them, which the optimizer of `compile` trains.
    for towers in ((rows(0.2), rows(0.2)), (None, rows(0.2))):
        model = model_of(*towers, optimizer=kind)
        np.testing.assert_allclose(fit(model, CALLBACKS[name]()), expected, rtol=1e-4)
        table = np.asarray(model.candidate_tower.embeddings)[:NUM_MOVIES]
        np.testing.assert_allclose(table, plain.candidate_tower.embeddings, rtol=1e-3, atol=1e-5)


def test_rates_change_by_the_factor_of_the_optimizer():
    record = Record()
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: [0.02, 0.0, 0.1, 0.1, 0.05][epoch])
    model = model_of(RowSGD(0.4), RowAdagrad(0.3), rate=0.2)
    fit(model, schedule, record)
    factors = np.array([0.1, 0.0, 0.5, 0.5, 0.25])
    np.testing.assert_allclose(record.rates, factors[:, None] * [0.2, 0.4, 0.3], rtol=1e-6)
    # A second fit starts from the rates that the first has left.
    record = Record()
    fit(model, keras.callbacks.LearningRateScheduler(lambda epoch: 0.2), record, epochs=1)
    np.testing.assert_allclose(record.rates, [[0.2, 0.4, 0.3]], rtol=1e-6)
    # Also without callbacks, and with those that change no rate.
    record = Record()
    model.optimizer.learning_rate = 0.01
    fit(model, record, epochs=1)
    np.testing.assert_allclose(record.rates, [[0.01, 0.4, 0.3]], rtol=1e-6)


def test_a_second_fit_after_a_rate_of_0():
    def down_to_0():
        return keras.callbacks.LearningRateScheduler(lambda epoch: 0.2 * (1 - epoch / 2))

    model = model_of(RowSGD(0.4), RowAdagrad(0.3), rate=0.2)
    for _ in range(2):
        record = Record()
        fit(model, down_to_0(), record, epochs=3)
        expected = np.array([1, 0.5, 0])[:, None] * [0.2, 0.4, 0.3]
        np.testing.assert_allclose(record.rates, expected, rtol=1e-6)


def test_a_rate_of_0_at_the_start_defines_no_factor():
    model = model_of(RowSGD(0.4), rate=0.0)
    model.query_tower.build()
    before = [np.array(v) for v in model.query_tower.weights]
    with pytest.raises(ValueError, match=r"positive.*Received: .*0\.0.*0\.1.*'user'.*Compile"):
        fit(model, keras.callbacks.LearningRateScheduler(lambda epoch: 0.1))
    for variable, value in zip(model.query_tower.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    # The optimizer of `compile` may stand still.
    model = model_of(RowSGD(0.4), rate=0.0)
    record = Record()
    fit(model, keras.callbacks.LearningRateScheduler(lambda epoch: 0.0), record, epochs=2)
    np.testing.assert_allclose(record.rates, [[0.0, 0.4]] * 2, rtol=1e-6)


class SetRowRate(keras.callbacks.Callback):
    """Sets the rate of the rows in one epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            self.model.query_tower.learning_rate = 0.6


def test_a_rate_of_rows_that_a_callback_sets_counts_from_then_on():
    record = Record()
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.2 * 0.5**epoch)
    model = model_of(RowSGD(0.4), RowAdagrad(0.3), rate=0.2)
    fit(model, schedule, SetRowRate(), record, epochs=4)
    expected = [[0.2, 0.4, 0.3], [0.1, 0.2, 0.15], [0.05, 0.6, 0.075], [0.025, 0.3, 0.0375]]
    np.testing.assert_allclose(record.rates, expected, rtol=1e-6)


def test_epochs_that_start_later_have_the_rates_of_their_number():
    def schedule():
        return keras.callbacks.LearningRateScheduler(lambda epoch: 0.2 * 0.5**epoch)

    whole, later = Record(), Record()
    fit(model_of(RowSGD(0.4)), schedule(), whole, epochs=5)
    fit(model_of(RowSGD(0.4)), schedule(), later, epochs=5, initial_epoch=3)
    np.testing.assert_allclose(later.rates, whole.rates[3:], rtol=1e-6)


def plateau():
    return keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0)


class Crash(keras.callbacks.Callback):
    """Stops training like a machine that fails."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            raise RuntimeError("The machine has failed.")


@pytest.mark.parametrize("backup_is_first", [False, True])
def test_backup_and_restore_resumes_with_the_rates(tmp_path, backup_is_first):
    def callbacks(path, *others):
        backup = keras.callbacks.BackupAndRestore(tmp_path / path)
        return [backup, plateau(), *others] if backup_is_first else [plateau(), backup, *others]

    def model():
        return model_of(RowSGD(0.4), RowAdagrad(0.3), rate=0.2)

    without_a_crash, resumed = Record(), Record()
    fit(model(), *callbacks("a", without_a_crash), epochs=3)
    with pytest.raises(RuntimeError, match="The machine has failed"):
        fit(model(), *callbacks("b", Crash()), epochs=6)
    after = model()
    fit(after, *callbacks("b", resumed), epochs=6)
    assert len(resumed.rates) == 3
    proportions = np.array(resumed.rates) / np.array(resumed.rates)[:, :1]
    np.testing.assert_allclose(proportions, [[1, 2, 1.5]] * 3, rtol=1e-6)
    # What was saved is what was in force after the last epoch, or before the plateau changed it.
    assert resumed.rates[0][0] in (without_a_crash.rates[-1][0], 2 * without_a_crash.rates[-1][0])


def test_weights_that_early_stopping_restores_keep_the_factor():
    model = model_of(RowSGD(0.4), RowAdagrad(0.3), rate=0.2)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.2 * 0.5**epoch)
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    fit(model, schedule, stop)
    assert stop.best_epoch < stop.stopped_epoch
    rate = rate_of(model.optimizer)
    assert rate < 0.2
    assert rate_of(model.query_tower) == pytest.approx(2 * rate)
    assert rate_of(model.candidate_tower) == pytest.approx(1.5 * rate)


@pytest.mark.parametrize("callback", [plateau, CALLBACKS["from 0 and through 0"]])
def test_a_row_optimizer_with_a_schedule_cannot_follow(callback):
    model = model_of(RowSGD(0.4), LazyAdam(SCHEDULE))
    model.candidate_tower.build()
    before = [np.array(v) for v in model.candidate_tower.weights]
    message = r"(?s)does not follow.*Received: `(Reduce|Learning).*'movie' with a `ExponentialDecay`.*Pass a float"
    for callbacks in ([callback()], keras.callbacks.CallbackList([callback()], model=model)):
        with pytest.raises(ValueError, match=message):
            model.fit(FEATURES, callbacks=callbacks, verbose=0)
    with pytest.raises(ValueError, match=r"does not follow.*0\.05 instead of 0\.2.*'movie' with a `ExponentialDecay`"):
        fit(model, OnTrainBegin())
    assert before == [] or all(np.array_equal(a, b) for a, b in zip(before, model.candidate_tower.weights, strict=True))
    model.candidate_tower.trainable = False
    model.compile(keras.optimizers.SGD(0.2))
    fit(model, callback())


def test_several_optimizers_have_no_one_rate_to_follow():
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("Keras before 3.15 has no `MultiOptimizer`")
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.2))
    optimizers["nothing"] = keras.optimizers.Adam(0.1)
    model = model_of(RowSGD(0.4))
    model.compile(keras.optimizers.MultiOptimizer(optimizers))
    with pytest.raises(ValueError, match=r"one optimizer.*Received: .*2 optimizers.*'user'"):
        fit(model, CALLBACKS["from 0 and through 0"]())


def test_an_optimizer_with_a_schedule_is_left_alone():
    record = Record()
    model = model_of(RowSGD(0.4), rate=keras.optimizers.schedules.ExponentialDecay(0.2, 1, 0.5))
    fit(model, record, epochs=2)
    np.testing.assert_allclose([rates[1] for rates in record.rates], [0.4, 0.4], rtol=1e-6)


def test_following_does_not_wait_for_each_batch(monkeypatch):
    model = model_of(RowSGD(0.4))
    syncs = []
    sync = model.jax_state_sync
    monkeypatch.setattr(model, "jax_state_sync", lambda: (syncs.append(1), sync()))

    def num_syncs(batch_size):
        syncs.clear()
        fit(model, keras.callbacks.Callback(), epochs=1, batch_size=batch_size)
        return len(syncs)

    assert num_syncs(batch_size=2) == num_syncs(batch_size=48)


def test_callbacks_of_any_form_reach_every_entry_point():
    class Count(keras.callbacks.Callback):
        number = 0

        def on_train_begin(self, logs=None):
            self.number += 1

        on_test_begin = on_predict_begin = on_train_begin

    model = model_of()
    for make in (lambda count: count, lambda count: [[count]], lambda count: keras.callbacks.CallbackList([count])):
        count = Count()
        assert model.fit(FEATURES, callbacks=make(count), verbose=0).history["loss"]
        model.evaluate(FEATURES, callbacks=make(count), verbose=0)
        model.predict({"user": FEATURES["user"]}, callbacks=make(count), verbose=0)
        assert count.number == 3


@pytest.mark.parametrize("as_list", [False, True])
def test_callbacks_of_any_form_on_a_mesh(as_list):
    keras.distribution.set_distribution(data_parallel(8))
    model = model_of(RowSGD(0.4), RowAdagrad(0.3))
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)
    model.fit(FEATURES, callbacks=[schedule] if as_list else schedule, verbose=0)
    assert rate_of(model.query_tower) == pytest.approx(0.2)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.05)
    model.fit(FEATURES, callbacks=keras.callbacks.CallbackList([schedule], model=model), verbose=0)
    assert rate_of(model.query_tower) == pytest.approx(0.1)
    assert rate_of(model.candidate_tower) == pytest.approx(0.075)
