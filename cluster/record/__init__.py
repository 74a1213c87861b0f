"""What a run leaves on disk: its folder, its lease and why it failed. Checkpoints belong to
`perceiver.train.checkpoint`."""
