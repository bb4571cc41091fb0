"""Probes: they look at a run along training and provably change nothing; `lockfree train --probe NAME` attaches one."""

from lockfree.probes.activations import Activations
from lockfree.probes.alignment import Alignment
from lockfree.probes.base import Probe, View
from lockfree.probes.information import Information

PROBES: dict[str, type[Probe]] = {"information": Information, "activations": Activations, "alignment": Alignment}
"""Every probe by its command-line name."""

__all__ = ["PROBES", "Activations", "Alignment", "Information", "Probe", "View"]
