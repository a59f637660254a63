"""Two-tower retrieval for Keras Recommenders on JAX."""

from keras_rs_contrib.callbacks import RefreshCandidates
from keras_rs_contrib.retrieval import ShardedBruteForceRetrieval, shard_candidates
from keras_rs_contrib.sharded_embedding import ShardedEmbedding
from keras_rs_contrib.two_tower_task import DistributedTwoTowerTask

__all__ = [
    "DistributedTwoTowerTask",
    "RefreshCandidates",
    "ShardedBruteForceRetrieval",
    "ShardedEmbedding",
    "shard_candidates",
]
