"""Where heads are read and edited while a model runs."""
