"""Ray itself: a local instance or a cluster, its processes and the hardware. Independent of the recipe's model."""
