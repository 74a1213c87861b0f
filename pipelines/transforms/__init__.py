"""Functions on one sample: decoding, augmentation, evaluation views. No Ray, no torch; randomness is passed in."""


class BadSample(Exception):
    """A sample that cannot be used; the message is a short reason without the sample's name."""
