"""Functions on one sample: decoding, augmentation, evaluation views. No Ray, no torch; randomness is passed in."""
