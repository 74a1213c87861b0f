"""Inject faults into real runs; `make faults` prints the table, the tests run part of it."""
