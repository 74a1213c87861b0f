"""From raw data to training batches: sources, shards, the sample plan, and their execution on Ray Data."""
