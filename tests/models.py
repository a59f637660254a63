"""Test models: the tutorial's model with a tied index, and a model with additional negatives."""

import keras
import keras_rs
import numpy as np

from keras_rs_contrib import DistributedTwoTowerTask, ShardedEmbedding, shard_candidates

DIMENSION = 4


def brute_force(k=5, return_scores=False, **kwargs):
    return keras_rs.layers.BruteForceRetrieval(k=k, return_scores=return_scores, **kwargs)


@keras.saving.register_keras_serializable(package="tests")
class RetrievalModel(keras.Model):
    """The tutorial's model. Its attributes can have any names, because Keras saves and loads them in order of name."""

    def __init__(
        self, num_users, num_movies, tower_name="candidate_embedding", index_name="retrieval", k=5, mesh_axis=None,
        is_sharded=False, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self.arguments = {
            "num_users": num_users,
            "num_movies": num_movies,
            "tower_name": tower_name,
            "index_name": index_name,
            "k": k,
            "mesh_axis": mesh_axis,
            "is_sharded": is_sharded,
        }
        tower_class = ShardedEmbedding if is_sharded else keras.layers.Embedding
        self.user_embedding = keras.layers.Embedding(num_users, DIMENSION, name="user")
        setattr(self, tower_name, tower_class(num_movies, DIMENSION, name="movie"))
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


@keras.saving.register_keras_serializable(package="tests")
class NegativesModel(keras.Model):
    """In-batch softmax with additional negatives. Row 0 of the movies is padding."""

    def __init__(self, num_users, num_movies, mixed_negatives=None, memory=None, **kwargs):
        super().__init__(**kwargs)
        self.num_users, self.num_movies = num_users, num_movies
        self.user_embedding = keras.layers.Embedding(num_users, DIMENSION, name="user")
        self.movie_embedding = keras.layers.Embedding(num_movies, DIMENSION, name="movie")
        self.mixed_negatives, self.memory = mixed_negatives, memory
        self.task = DistributedTwoTowerTask(remove_accidental_hits=True)

    def build(self, input_shape):
        self.user_embedding.build(input_shape)
        self.movie_embedding.build(input_shape)
        if self.memory is not None and not self.memory.built:
            self.memory.build((None, DIMENSION))

    def call(self, user_ids):
        return self.user_embedding(user_ids)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        candidates = {"candidate_ids": y, "candidate_mask": y != 0}
        if self.mixed_negatives is not None:
            candidates = self.mixed_negatives(y, candidate_mask=y != 0, training=training)._asdict()
        candidates["candidate_embeddings"] = self.movie_embedding(candidates["candidate_ids"])
        if self.memory is not None:
            candidates = self.memory(**candidates, training=training)._asdict()
        return self.task(y_pred, **candidates)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        layers = {"mixed_negatives": serialize(self.mixed_negatives), "memory": serialize(self.memory)}
        return {**super().get_config(), "num_users": self.num_users, "num_movies": self.num_movies, **layers}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("mixed_negatives", "memory"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)
