"""From raw data to training batches: sources, shards, the sample plan, and its execution on Ray Data."""
