"""Capacity planning: what a recipe needs and costs on hardware that need not be there."""
