"""Callbacks of Keras that monitor a rank metric know in which direction it improves."""

import inspect

import keras
import numpy as np
import pytest

from keras_rs_contrib import EvaluateQueries, MeanReciprocalRank, NDCGAtK, RecallAtK, TwoTowerModel
from keras_rs_contrib.metrics import RankMetric

NUM_USERS, NUM_MOVIES = 12, 16
# Each user watches four films of its own group: the towers learn the groups within a few epochs.
USERS = np.arange(NUM_USERS).repeat(4)
DATA = {"user_id": USERS, "movie_id": (USERS % 4) * 4 + np.tile(np.arange(4), NUM_USERS)}
QUERIES = {"user_id": np.arange(NUM_USERS)}
POSITIVES = DATA["movie_id"].reshape(NUM_USERS, 4)


class MeanRank(RankMetric):
    """Lower is better."""

    higher_is_better = False

    def values(self, ranks):
        return keras.ops.mean(keras.ops.cast(ranks, "float32"), axis=1)


class TurnAround(keras.callbacks.Callback):
    """Lets the towers learn for some epochs, and forget what they have learned in the epochs after."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.query_tower.embeddings.assign(-self.model.query_tower.embeddings.value)


def fit(*callbacks, epochs=8, turn=4, **arguments):
    keras.utils.set_random_seed(0)
    model = TwoTowerModel(
        keras.layers.Embedding(NUM_USERS, 8), keras.layers.Embedding(NUM_MOVIES, 8), "user_id", "movie_id",
        corpus_metrics=[NDCGAtK(3), MeanReciprocalRank(), MeanRank(name="mean_rank")],
    )  # fmt: skip
    model.compile(keras.optimizers.Adam(0.05))
    arguments.setdefault("validation_data", DATA)
    history = model.fit(DATA, epochs=epochs, verbose=0, callbacks=[TurnAround(turn), *callbacks], **arguments).history
    return model, history


@pytest.mark.parametrize("monitor", ["val_ndcg_at_3", "val_mean_rank", "val_query_mean_rank", "users_recall_at_2"])
def test_early_stopping_stops_when_a_metric_gets_worse(monitor):
    """The metric improves for four epochs and then gets worse: stopping in the wrong direction would come earlier."""
    evaluate = [EvaluateQueries(QUERIES, POSITIVES)]
    if monitor.startswith("users_"):
        evaluate = [EvaluateQueries(QUERIES, POSITIVES, metrics=[RecallAtK(2)], prefix="users_")]
    _, history = fit(*evaluate, turn=99)
    rising = np.array(history[monitor])
    worst = min if "mean_rank" not in monitor else max
    assert rising[0] == worst(rising)
    assert rising[3] != rising[0]
    stopping = keras.callbacks.EarlyStopping(monitor=monitor, patience=3)
    _, history = fit(*evaluate, stopping, epochs=12)
    values = np.array(history[monitor]) * (-1 if "mean_rank" in monitor else 1)
    assert len(values) < 12
    assert stopping.best_epoch == np.argmax(values)
    assert 0 < stopping.best_epoch <= 4
    assert stopping.stopped_epoch == stopping.best_epoch + 3


def test_a_checkpoint_keeps_the_best_epoch(tmp_path):
    path = tmp_path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, monitor="val_ndcg_at_3", save_best_only=True, save_weights_only=True
    )
    model, history = fit(checkpoint)
    values = history["val_ndcg_at_3"]
    assert values[-1] < max(values)
    model.load_weights(path)
    assert model.evaluate(DATA, verbose=0, return_dict=True)["ndcg_at_3"] == pytest.approx(max(values))


def test_the_learning_rate_falls_while_a_metric_does_not_improve():
    reduce = keras.callbacks.ReduceLROnPlateau(monitor="val_query_ndcg_at_3", patience=2, factor=0.5)
    _, history = fit(EvaluateQueries(QUERIES, POSITIVES), reduce)
    rates = np.array(history["learning_rate"])
    best = np.argmax(history["val_query_ndcg_at_3"])
    assert len(set(rates[: best + 2])) == 1
    assert rates[-1] < rates[0]


def test_callbacks_may_come_by_position_and_alone():
    stopping = keras.callbacks.EarlyStopping(monitor="val_ndcg_at_3", patience=2)
    model = TwoTowerModel(
        keras.layers.Embedding(NUM_USERS, 8), keras.layers.Embedding(NUM_MOVIES, 8), "user_id", "movie_id",
        corpus_metrics=[NDCGAtK(3)],
    )  # fmt: skip
    model.compile(keras.optimizers.Adam(0.05))
    model.fit(DATA, None, 32, 2, 0, stopping, validation_data=DATA)
    assert (stopping.mode, float(stopping.best)) == ("max", max(model.history.history["val_ndcg_at_3"]))


def test_a_mode_of_the_user_is_kept_and_other_metrics_are_left_to_keras():
    chosen = keras.callbacks.EarlyStopping(monitor="val_ndcg_at_3", mode="min", patience=99)
    loss = keras.callbacks.EarlyStopping(monitor="val_loss", patience=99)
    fit(chosen, loss, epochs=2)
    assert (chosen.mode, loss.mode) == ("min", "auto")
    with pytest.raises(ValueError, match="isn't able to automatically determine"):
        fit(keras.callbacks.EarlyStopping(monitor="val_unknown"), epochs=2)


def test_fit_keeps_its_signature_and_checks_its_arguments():
    assert "validation_data" in inspect.signature(TwoTowerModel.fit).parameters
    with pytest.raises(TypeError, match="epoch"):
        fit(epoch=3)
