"""A recipe becomes a run on Ray: recipes, checks, drivers, workers, jobs, clusters. Models belong to
`perceiver`, data to `pipelines`."""
