"""`perceiver doctor`: checks of this machine or cluster that change nothing."""
