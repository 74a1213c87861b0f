"""A running search: its checks, driver, trials and schedulers. Where values come from belongs to `space`."""
