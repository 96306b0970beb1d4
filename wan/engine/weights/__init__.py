"""Weights on their way from files to networks."""
