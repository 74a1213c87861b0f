"""The record of a run, the process that sends it to MLflow, redaction of secrets, and texts that are safe to print."""
