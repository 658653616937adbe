"""What only measuring a finished run needs."""
