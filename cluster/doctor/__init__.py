"""`perceiver doctor`: read-only checks of this machine or of a cluster."""
