"""One file per family of formats: path -> blocks of text with their places."""
