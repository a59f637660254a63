"""Embedding tables that are split over devices, with dense or row-sparse training."""
