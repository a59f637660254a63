"""Files of version 0.1: `files/expected.json` holds what that version computed from each."""

import json
import pathlib

import keras
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import TwoTowerModel

FILES = pathlib.Path(__file__).parent / "files"
EXPECTED = json.loads((FILES / "expected.json").read_text())
NUM_USERS, NUM_MOVIES = 21, 53
# On two devices: its 53 rows, and the optimizer's slots for them, have no padding to make them divide.
WITHOUT_PADDING = "sharded.keras"


def load(name) -> TwoTowerModel:
    return keras.models.load_model(FILES / name)


def make_data(name):
    """The data that the models were trained on."""
    rng = np.random.default_rng(1)
    users, movies = rng.integers(0, NUM_USERS, 96), rng.integers(1, NUM_MOVIES, 96)
    if name != "feature_tower.keras":
        return {"user": users, "movie": movies}
    features = rng.random((NUM_MOVIES, 3)).astype("float32")
    return {"user": users, "features": features[movies], "movie": movies + 100}


def losses_of_one_more_epoch(model, name):
    return model.fit(make_data(name), batch_size=32, shuffle=False, verbose=0).history["loss"]


@pytest.mark.parametrize("name", EXPECTED)
def test_old_files_recommend_and_train_as_before(name):
    model = load(name)
    ids, scores = model.recommend({"user": np.arange(NUM_USERS)}, k=3)
    np.testing.assert_array_equal(ids, EXPECTED[name]["ids"])
    np.testing.assert_allclose(scores, EXPECTED[name]["scores"], rtol=1e-5)
    np.testing.assert_allclose(losses_of_one_more_epoch(model, name), EXPECTED[name]["losses"], rtol=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_old_files_train_as_before_on_two_devices(name):
    keras.distribution.set_distribution(data_parallel(2))
    if name == WITHOUT_PADDING:
        with pytest.raises(ValueError, match="load_weights"):
            load(name)
        return
    np.testing.assert_allclose(losses_of_one_more_epoch(load(name), name), EXPECTED[name]["losses"], rtol=1e-5)
