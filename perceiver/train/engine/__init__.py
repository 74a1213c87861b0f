"""Engines that take an optimizer step over all ranks: the protocol and DeepSpeed. No data, no hooks."""
