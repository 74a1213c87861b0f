"""Checkpoints: store, file format, schedule, and the sample ledger. The layout of a rank's state in memory belongs to
`train/engine`."""
