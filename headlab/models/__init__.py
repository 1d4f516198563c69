"""What a model is: its attention modules and where their heads lie, its norms and positions; and variants of models."""
