"""Searches and tables of results with Ray Tune. A single training run belongs in `cluster.run`."""
