"""The retrieval task: computes a loss from query and candidate embeddings."""
