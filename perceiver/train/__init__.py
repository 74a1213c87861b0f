"""The training loop, its hooks and the policy for a bad loss: read `loop.py` first. No Ray, no data pipeline."""
