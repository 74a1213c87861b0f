"""Metrics to MLflow: the tracker, the MLflow writer, system metrics and redaction. Nothing here knows a model."""
