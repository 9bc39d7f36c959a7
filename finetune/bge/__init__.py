"""Training of BGE retrievers."""
