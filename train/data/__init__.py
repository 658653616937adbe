"""Images and relevance maps in one stream."""
