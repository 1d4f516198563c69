"""What heads look at: statistics of their patterns, their roles, which are alike, and patterns on a prompt."""
