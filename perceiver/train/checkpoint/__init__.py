"""Checkpoints: the store, what is written and when, and the sample ledger. How a rank's state is laid out in memory
belongs to `train/engine`."""
