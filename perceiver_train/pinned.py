"""Imports our packages when it is imported: the module that Ray preloads in the workers of a local instance."""

from perceiver_train import pin

pin()
