"""The tutorial's model with the tied index, as a user writes it."""

import keras
import keras_rs
import numpy as np

from keras_rs_contrib import DistributedTwoTowerTask, shard_candidates

DIMENSION = 4


def brute_force(k=5, return_scores=False, **kwargs):
    return keras_rs.layers.BruteForceRetrieval(k=k, return_scores=return_scores, **kwargs)


@keras.saving.register_keras_serializable(package="tests")
class RetrievalModel(keras.Model):
    """Its attributes may bear any names, for Keras saves and loads them in the names' order."""

    def __init__(
        self, num_users, num_movies, tower_name="candidate_embedding", index_name="retrieval", k=5, mesh_axis=None,
        **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self.arguments = {
            "num_users": num_users,
            "num_movies": num_movies,
            "tower_name": tower_name,
            "index_name": index_name,
            "k": k,
            "mesh_axis": mesh_axis,
        }
        self.user_embedding = keras.layers.Embedding(num_users, DIMENSION, name="user")
        setattr(self, tower_name, keras.layers.Embedding(num_movies, DIMENSION, name="movie"))
        index = shard_candidates(brute_force(k), self.the_tower, exclude_ids=[0], mesh_axis=mesh_axis)
        setattr(self, index_name, index)
        self.task = DistributedTwoTowerTask()

    @property
    def the_tower(self):
        return getattr(self, self.arguments["tower_name"])

    @property
    def the_index(self):
        return getattr(self, self.arguments["index_name"])

    def call(self, user_ids, training=False):
        user_embeddings = self.user_embedding(user_ids)
        result = {"user_embeddings": user_embeddings}
        if not training:
            result["predictions"] = self.the_index(user_embeddings)
        return result

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        movie_embeddings = self.the_tower(y["movie_id"])
        return self.task(y_pred["user_embeddings"], movie_embeddings, labels=y["rating"], sample_weight=sample_weight)

    def get_config(self):
        return {**super().get_config(), **self.arguments}


def predictions(model):
    num_users = model.arguments["num_users"]
    return model.predict(np.arange(num_users, dtype="int32"), batch_size=num_users, verbose=0)["predictions"]
