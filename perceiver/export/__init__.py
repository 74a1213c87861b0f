"""Trained models outside a run: weights, the transformers layout, ONNX, MLflow models and serving. No training."""
