"""Training data: rows and their checks, where they come from, and the negatives mined for them."""
