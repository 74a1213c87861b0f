"""Baselines of the papers, one file each. A new one is a file with a config that has `kind` and `build`."""
