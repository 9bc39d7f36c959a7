"""Files into LangChain documents, and documents into chunks."""
