"""Offline preprocessing: images into tar shards, tar shards into relevance maps."""
