"""Training of ChatGLM3 for answering from references."""
