"""The parts of a training worker: what it knows, its hooks, what it leaves behind, and its way to the driver."""
