"""Negatives beyond the batch, and the sampling probabilities of candidates."""
