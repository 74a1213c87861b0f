"""A recipe for prepared data (`perceiver init DATA`): its sections, the length that fits a given time, its text."""
