"""What fits which cards, and how fast: known before a weight is read."""
