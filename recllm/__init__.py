"""recllm: a recommender from logs and item text, by a small language model and matrix factorization."""

__version__ = "0.1.0"
