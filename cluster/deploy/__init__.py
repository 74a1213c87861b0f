"""Files that start a real cluster: one template per kind, and the module that fills them in."""
