"""QK and OV circuits, from the weights: as matrices, in numbers, as tokens, and how they compose."""
