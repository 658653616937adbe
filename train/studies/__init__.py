"""Experiments around a finished run: they train variants of it and measure them."""
