"""Training and evaluation: shards and relevance maps into a Zoomer, a ZoomViT and their figures."""
