"""The record of a run, the process that sends it to MLflow, and redaction of secrets. No models, no data."""
