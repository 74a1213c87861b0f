"""`python -m perceiver.cli`: the command where no script is installed, as in the working directory of a job."""

from perceiver.cli import main

main()
