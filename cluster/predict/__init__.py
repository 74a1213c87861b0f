"""Evaluation and prediction with a trained model: `perceiver evaluate` and `perceiver predict`. No training."""
