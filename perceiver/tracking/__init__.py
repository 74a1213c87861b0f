"""What a run records, and the process that sends it to MLflow; redaction of secrets. Nothing here knows a model."""
