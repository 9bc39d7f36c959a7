"""Training of the retriever and the generator on the knowledge base's own documents."""
