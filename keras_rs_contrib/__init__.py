"""Two-tower retrieval for Keras Recommenders on JAX."""

try:
    import keras as _  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("tensorflow", "torch", "jax"):
        raise
    raise ImportError(
        "Keras needs its backend, which is TensorFlow unless KERAS_BACKEND names another one. Received: no module "
        f"{error.name!r}. Set the environment variable KERAS_BACKEND=jax before the first import of Keras."
    ) from error

from keras_rs_contrib.batches import PaddedBatches, pad_batches
from keras_rs_contrib.checkpoints.callback import TrainingCheckpoint
from keras_rs_contrib.ids import group_candidate_ids
from keras_rs_contrib.index.retrieval import ShardedBruteForceRetrieval
from keras_rs_contrib.index.shard_candidates import shard_candidates
from keras_rs_contrib.metrics import MeanReciprocalRank, NDCGAtK, RecallAtK
from keras_rs_contrib.model.callbacks import EvaluateQueries, RefreshCandidates
from keras_rs_contrib.model.history_tower import HistoryTower
from keras_rs_contrib.model.loading import load_model
from keras_rs_contrib.model.recommend import Recommendations
from keras_rs_contrib.model.two_tower_model import TwoTowerModel
from keras_rs_contrib.negatives.memory import CrossBatchMemory
from keras_rs_contrib.negatives.mixed import MixedNegatives, mixed_sampling_probability
from keras_rs_contrib.negatives.sampling import StreamingSamplingProbability
from keras_rs_contrib.tables.lookup_together import lookup_together
from keras_rs_contrib.tables.row_optimizers import LazyAdam, RowAdagrad, RowSGD, RowWiseAdagrad
from keras_rs_contrib.tables.row_sparse_embedding import RowSparseEmbedding
from keras_rs_contrib.tables.sharded_embedding import ShardedEmbedding
from keras_rs_contrib.task.two_tower_task import DistributedTwoTowerTask
from keras_rs_contrib.vocabulary import Vocabulary

__all__ = [
    "CrossBatchMemory",
    "DistributedTwoTowerTask",
    "EvaluateQueries",
    "HistoryTower",
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
    "TrainingCheckpoint",
    "TwoTowerModel",
    "Vocabulary",
    "group_candidate_ids",
    "load_model",
    "lookup_together",
    "mixed_sampling_probability",
    "pad_batches",
    "shard_candidates",
]
