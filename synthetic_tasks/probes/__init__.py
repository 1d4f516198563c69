"""Small models of every kind of attention, trained on records and held against the truth."""
