"""The papers' comparisons: across data, stacks and training time (Michel, Levy & Neubig 2019)."""
