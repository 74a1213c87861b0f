"""Batches for training and evaluation: the sample plan, executed by Ray Data. File formats belong in `shards`."""
