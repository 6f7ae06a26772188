"""Batches to weights. Knows no Ray."""
