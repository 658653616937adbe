"""The two training stages, and the loop that they share."""
