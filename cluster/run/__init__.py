"""A training run: the driver, the worker and what they tell each other. Read `launch.py`, then `worker.py`."""
