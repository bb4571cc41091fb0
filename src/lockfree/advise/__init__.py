"""`advise`: what could replace backpropagation for one's own model, measured on it; and whether anything should."""

from lockfree.advise.advice import Advice
from lockfree.advise.advise import advise
from lockfree.advise.memory import Memory, parse_memory
from lockfree.advise.option import Option, pareto_front

__all__ = ["Advice", "Memory", "Option", "advise", "pareto_front", "parse_memory"]
