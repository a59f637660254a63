"""The retrieval task: from embeddings to a loss."""
