"""A model that names no task, index and sampling probability is a good recommender."""

import os
import pathlib
import sys

import keras
import numpy as np
import pytest

from keras_rs_contrib import TwoTowerModel, group_candidate_ids

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import movielens

prepared = pytest.mark.skipif(
    not list(pathlib.Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).glob("movielens/100k-ratings/*")),
    reason="MovieLens 100K is not prepared under TFDS_DATA_DIR",
)


def user_metrics(ratings, epochs):
    """The metrics of the users' lists, of a model with defaults and of popularity."""
    train, held_out = movielens.split(ratings, 0)
    towers = keras.layers.Embedding(movielens.NUM_USERS + 1, 64), keras.layers.Embedding(movielens.NUM_MOVIES + 1, 64)
    model = TwoTowerModel(*towers, "user_id", "movie_id")
    model.compile("adam")
    model.fit(
        {"user_id": train.user_ids, "movie_id": train.movie_ids},
        batch_size=256,
        epochs=epochs,
        seen="training",
        verbose=0,
    )
    users = np.arange(1, movielens.NUM_USERS + 1)
    films = group_candidate_ids(held_out.user_ids, held_out.movie_ids, users)
    return [model.evaluate_queries(users, films, by_popularity=popular) for popular in (False, True)]


def test_defaults_find_the_tastes_of_synthetic_users():
    ours, popularity = user_metrics(movielens.synthetic(), epochs=3)
    assert ours["ndcg_at_10"] > 1.5 * popularity["ndcg_at_10"]
    assert ours["recall_at_10"] > 1.5 * popularity["recall_at_10"]


@prepared
@pytest.mark.movielens
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_defaults_reach_the_quality_of_tuned_models_on_movielens():
    ours, popularity = user_metrics(movielens.load("movielens"), epochs=10)
    assert ours["ndcg_at_10"] >= 0.40
    assert popularity["ndcg_at_10"] < 0.25
