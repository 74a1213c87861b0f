"""All rows of the table, in the order in which they are printed."""

from tests.faults import drivers, heads, network, nodes, stores, trackers, workers
from tests.faults.table import SCENARIOS, chosen

__all__ = ["SCENARIOS", "chosen", "drivers", "heads", "network", "nodes", "stores", "trackers", "workers"]
