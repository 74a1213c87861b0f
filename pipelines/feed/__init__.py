"""Batches for training and evaluation: Ray Data executes the sample plan. File formats belong to `shards`."""
