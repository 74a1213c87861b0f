"""Prepared data on disk: manifest, shards, and how they are read, listed and checked. What a sample means belongs to
`features`, which sample is read when to `order`.

A row group is the unit of reading: a record batch of an Arrow IPC file, or a row group of a Parquet file.
"""
