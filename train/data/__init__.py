"""Streams images together with their relevance maps."""
