"""Negatives from outside the batch, and the sampling probabilities of candidates."""
