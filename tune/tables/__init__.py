"""`perceiver reproduce`: the papers' tables as searches with fixed trials."""
