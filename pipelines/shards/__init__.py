"""Prepared data on disk: manifest, shards, and how they are read, listed and checked. What a sample means belongs to
`features`."""
