"""Every HTML page of the project, built from plain data. What collects the data belongs to its own package."""
