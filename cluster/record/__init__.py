"""The record of a run on disk: its folder, its lease, its failures. Checkpoints are in `perceiver.train.checkpoint`."""
