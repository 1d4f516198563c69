"""Fewer heads: pruning curves, and models that really are smaller."""
