"""Two-tower retrieval for Keras Recommenders on JAX."""

from keras_rs_contrib.retrieval import ShardedBruteForceRetrieval, shard_candidates
from keras_rs_contrib.two_tower_task import DistributedTwoTowerTask

__all__ = ["DistributedTwoTowerTask", "ShardedBruteForceRetrieval", "shard_candidates"]
