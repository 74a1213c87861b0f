"""Ray jobs: submit a recipe or a search, follow and stop it. The training that a job runs belongs to `run`."""
