"""Reasoning in Memory (RiM): training language models to reason in fixed blocks of memory tokens."""

__version__ = "0.1.0"
