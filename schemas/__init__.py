"""Contracts on disk: the only package that both `zpipe.pipeline` and `zpipe.train` know. No torch, no ray."""
