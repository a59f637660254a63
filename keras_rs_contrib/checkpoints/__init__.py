"""Checkpoints of a training, from which the same `fit` continues as if nothing had happened."""
