"""Ray itself: a local instance or a cluster, its processes and the hardware. Nothing here knows a recipe's model."""
