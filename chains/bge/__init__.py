"""BGE: model directories, tokenizer, encoder, engines, embeddings and reranker."""
