"""Two-tower models: `fit`, `evaluate`, `predict` and `recommend` on dicts of features."""
