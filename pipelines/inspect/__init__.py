"""`perceiver inspect`: reports on a prepared folder and on damage in it. Nothing here writes to the folder."""
