"""`perceiver inspect`: what a prepared folder contains and whether it is sound. It changes nothing."""
