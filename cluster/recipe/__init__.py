"""Recipes and everything that can be refused before a worker starts. Nothing here starts Ray."""
