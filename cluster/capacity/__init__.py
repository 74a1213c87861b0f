"""Capacity planning: estimates of a recipe's needs and cost on any hardware, and the calibration of this machine."""
