"""Data sets and models: what they are fetched from and how a record reads."""
