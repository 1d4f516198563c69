"""How language models do on sentences: encoded, scored, and where their heads look."""
