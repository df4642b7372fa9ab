"""Dropping is correct, not merely running: every model family against independent witnesses."""
