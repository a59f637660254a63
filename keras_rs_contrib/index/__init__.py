"""Candidate indexes: exact top-k and ranks over the table of a candidate tower."""
