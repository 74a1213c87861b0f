"""A running search: checks, driver, trials and schedulers. The space and its samplers belong in `space`."""
