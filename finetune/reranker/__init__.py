"""Fine-tuning of the reranker."""
