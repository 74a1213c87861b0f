"""Ray jobs: submitting a recipe or a search, following and stopping it. What the job then runs belongs to `run`."""
