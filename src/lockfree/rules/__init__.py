"""Every rule: one file each, one line each here, and nowhere else a list of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lockfree.choose import choose
from lockfree.rule import Rule
from lockfree.rules.aug_local import AugLocal
from lockfree.rules.backprop import Backprop
from lockfree.rules.checkpointing import Checkpointing
from lockfree.rules.decoupled_greedy import DecoupledGreedy
from lockfree.rules.direct_feedback_alignment import DirectFeedbackAlignment
from lockfree.rules.direct_random_targets import DirectRandomTargets
from lockfree.rules.feedback_alignment import FeedbackAlignment
from lockfree.rules.forward_forward import ForwardForward
from lockfree.rules.hsic_bottleneck import HSICBottleneck
from lockfree.rules.info_pro import InfoPro
from lockfree.rules.kickback import Kickback
from lockfree.rules.local_loss import LocalLoss
from lockfree.rules.mono_forward import MonoForward
from lockfree.rules.noise import Noise
from lockfree.rules.sign_symmetry import SignSymmetry
from lockfree.rules.synthetic_gradients import SyntheticGradients

RULES: dict[str, Callable[..., Rule]] = {
    "backprop": Backprop,
    "checkpoint": Checkpointing,
    "dni": SyntheticGradients,
    "cdni": partial(SyntheticGradients, conditioned=True),
    "fa": FeedbackAlignment,
    "usf": SignSymmetry,
    "brsf": partial(SignSymmetry, magnitude="batchwise"),
    "frsf": partial(SignSymmetry, magnitude="fixed"),
    "kickback": Kickback,
    "dfa": DirectFeedbackAlignment,
    "drtp": DirectRandomTargets,
    "ff": ForwardForward,
    "hsic": HSICBottleneck,
    "predsim": LocalLoss,
    "pred": partial(LocalLoss, loss="pred"),
    "sim": partial(LocalLoss, loss="sim"),
    "mono": MonoForward,
    "dgl": DecoupledGreedy,
    "infopro": InfoPro,
    "auglocal": AugLocal,
    "noise": Noise,
}
"""Every rule by its command-line name."""


def get(name: str, **fields: Any) -> Rule:
    """Makes a rule by its command-line name.

    Args:
        name: One of `RULES`.
        **fields: Hyperparameters of the rule.

    Raises:
        ValueError: If there is no such rule; the nearest name is given.

    Example:
        >>> get("cdni").conditioned
        True
    """
    return choose(RULES, name, "rule")(**fields)


__all__ = [
    "RULES",
    "AugLocal",
    "Backprop",
    "Checkpointing",
    "DecoupledGreedy",
    "DirectFeedbackAlignment",
    "DirectRandomTargets",
    "FeedbackAlignment",
    "ForwardForward",
    "HSICBottleneck",
    "InfoPro",
    "Kickback",
    "LocalLoss",
    "MonoForward",
    "Noise",
    "SignSymmetry",
    "SyntheticGradients",
    "get",
]
