"""Files that start a real cluster: a template for each kind, and the small module that fills them in."""
