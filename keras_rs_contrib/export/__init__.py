"""Export of retrieval to formats that run without this package."""
