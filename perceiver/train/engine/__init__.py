"""Engines that take an optimizer step over all ranks: the protocol, plain torch, DeepSpeed. No data, no hooks."""
