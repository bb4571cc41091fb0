"""A server and workers in processes of their own, on Ray; any of them may die, and the run goes on."""

from lockfree.server.cluster.engine import Ray

__all__ = ["Ray"]
