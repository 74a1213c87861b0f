"""Optimizers and learning-rate schedules with their configuration. What shards their state is `train/engine`."""
