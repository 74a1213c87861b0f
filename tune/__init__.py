"""Searches and tables of results with Ray Tune. What a single training run does belongs to `cluster.run`."""
