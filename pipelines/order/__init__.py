"""Which sample comes when, as pure functions of a few integers. No I/O, no Ray, no torch."""
