"""Functions on one sample: decoding, augmentation, views. No Ray; torch only to resize; randomness is an argument."""


class BadSample(Exception):
    """An unusable sample; the message is a short reason without the sample's name."""
