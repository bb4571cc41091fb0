"""Probes: they look at a run along training and provably change nothing; `lockfree train --probe NAME` attaches one."""

from lockfree.probes.activations import Activations
from lockfree.probes.alignment import Alignment
from lockfree.probes.base import Probe, View
from lockfree.probes.gradient_quality import GradientQuality
from lockfree.probes.implied_loss import ImpliedLoss, along_path
from lockfree.probes.information import Information
from lockfree.probes.representation import Representation, dissimilarity, linear_cka, linear_probe, participation_ratio

PROBES: dict[str, type[Probe]] = {
    "information": Information,
    "activations": Activations,
    "alignment": Alignment,
    "gradient-quality": GradientQuality,
    "implied-loss": ImpliedLoss,
    "representation": Representation,
}
"""Every probe by its command-line name."""

__all__ = [
    "PROBES",
    "Activations",
    "Alignment",
    "GradientQuality",
    "ImpliedLoss",
    "Information",
    "Probe",
    "Representation",
    "View",
    "along_path",
    "dissimilarity",
    "linear_cka",
    "linear_probe",
    "participation_ratio",
]
