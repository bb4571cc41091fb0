"""Blocks of equal structure that do not wait for each other learn in one batched operation."""

from lockfree.executors.stacked.executor import Stacked

__all__ = ["Stacked"]
