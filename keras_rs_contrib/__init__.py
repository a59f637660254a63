"""Two-tower retrieval for Keras Recommenders on JAX."""

from keras_rs_contrib.batches import PaddedBatches, pad_batches
from keras_rs_contrib.callbacks import EvaluateQueries, RefreshCandidates
from keras_rs_contrib.candidate_ids import group_candidate_ids
from keras_rs_contrib.cross_batch_memory import CrossBatchMemory
from keras_rs_contrib.metrics import MeanReciprocalRank, NDCGAtK, RecallAtK
from keras_rs_contrib.mixed_negatives import MixedNegatives, mixed_sampling_probability
from keras_rs_contrib.retrieval import ShardedBruteForceRetrieval, shard_candidates
from keras_rs_contrib.row_optimizers import LazyAdam, RowAdagrad, RowSGD, RowWiseAdagrad
from keras_rs_contrib.row_sparse_embedding import RowSparseEmbedding, lookup_together
from keras_rs_contrib.sampling import StreamingSamplingProbability
from keras_rs_contrib.sharded_embedding import ShardedEmbedding
from keras_rs_contrib.two_tower_model import Recommendations, TwoTowerModel
from keras_rs_contrib.two_tower_task import DistributedTwoTowerTask

__all__ = [
    "CrossBatchMemory",
    "DistributedTwoTowerTask",
    "EvaluateQueries",
    "LazyAdam",
    "MeanReciprocalRank",
    "MixedNegatives",
    "NDCGAtK",
    "PaddedBatches",
    "RecallAtK",
    "Recommendations",
    "RefreshCandidates",
    "RowAdagrad",
    "RowSGD",
    "RowSparseEmbedding",
    "RowWiseAdagrad",
    "ShardedBruteForceRetrieval",
    "ShardedEmbedding",
    "StreamingSamplingProbability",
    "TwoTowerModel",
    "group_candidate_ids",
    "lookup_together",
    "mixed_sampling_probability",
    "pad_batches",
    "shard_candidates",
]
