"""A trained model applied to data: `perceiver evaluate` and `perceiver predict`. No training."""
