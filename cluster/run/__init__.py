"""A training run: its driver and the function of its workers. Read `launch.py`, then `worker.py`."""
