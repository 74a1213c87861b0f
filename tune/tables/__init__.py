"""`perceiver reproduce`: the papers' tables as searches whose trials are known beforehand."""
