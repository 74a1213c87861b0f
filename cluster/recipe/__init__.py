"""Recipes, and all checks that are made before a worker starts. Nothing here starts Ray."""
