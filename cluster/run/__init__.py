"""A training run: the driver, the workers and the channel between them. Read `launch.py`, then `worker.py`."""
