"""Flags for checkpoints, from which the same command continues a training that was stopped."""

from absl import flags

from keras_rs_contrib import TrainingCheckpoint

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "checkpoint_dir",
    None,
    "Folder for checkpoints of the training. If it holds some, training continues from the newest one.",
)
flags.DEFINE_integer(
    "checkpoint_every_steps", None, "Training steps between checkpoints. By default, one epoch.", lower_bound=1
)


def checkpoints() -> list[TrainingCheckpoint]:
    """Returns the callback that the flags describe, or none."""
    if FLAGS.checkpoint_dir is None:
        return []
    return [TrainingCheckpoint(FLAGS.checkpoint_dir, every_steps=FLAGS.checkpoint_every_steps)]
