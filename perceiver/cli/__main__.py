"""``python -m perceiver.cli``: the command where no script is installed, as in a job's working directory."""

from perceiver.cli import main

main()
