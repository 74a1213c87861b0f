"""An example of a package with plug-ins for perceiver-train: a task and a hook."""
