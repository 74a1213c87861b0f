"""The order of the samples, as pure functions of a few integers. No I/O, no Ray, no torch."""
