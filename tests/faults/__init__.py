"""Faults put upon real runs: `make faults` prints one table, the tests hold a part of it."""
