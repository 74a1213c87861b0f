"""Prepared data on disk: the manifest and the shards, and how they are written, read, listed and checked.

A row group is the unit of reading: a record batch of an Arrow IPC file, or a row group of a Parquet file. The meaning
of a sample belongs in `features`, the order of the samples in `order`.
"""
