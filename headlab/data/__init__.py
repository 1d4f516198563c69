"""The data: batches and texts, and what a model's own loss on them is."""
