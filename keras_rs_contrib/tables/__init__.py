"""Embedding tables: split over devices, and trained row by row."""
