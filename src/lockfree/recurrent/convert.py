"""From a recurrent core and a readout to a learner."""

from collections.abc import Sequence

from torch import nn

from lockfree.choose import choose
from lockfree.convert import OptimizerFactory
from lockfree.objective import Loss, Objective
from lockfree.recurrent.alternation import Alternating
from lockfree.recurrent.bootstrap import Bootstrap, NoBootstrap, Oracle
from lockfree.recurrent.coordinatewise import CoordinatewiseSynthesiser
from lockfree.recurrent.eligibility import BPLambda
from lockfree.recurrent.learner import RecurrentLearner
from lockfree.recurrent.remembering import RecurrentSynthesiser
from lockfree.recurrent.solved import LeastSquaresGradient
from lockfree.recurrent.synthetic import SyntheticGradient
from lockfree.update import Update

BOOTSTRAPS: dict[str, type[Bootstrap]] = {
    "none": NoBootstrap,
    "alternating": Alternating,
    "bp-lambda": BPLambda,
    "dni": SyntheticGradient,
    "dni-coordinatewise": CoordinatewiseSynthesiser,
    "dni-recurrent": RecurrentSynthesiser,
    "dni-solved": LeastSquaresGradient,
    "oracle": Oracle,
}
"""Every bootstrap by its command-line name."""


def convert(
    core: nn.Module,
    readout: nn.Module,
    *,
    horizon: int,
    bootstrap: Bootstrap | str = "none",
    loss: Loss,
    optimizer: OptimizerFactory,
    auxiliary: bool = False,
    clip_norm: float | None = None,
    accumulate: int = 1,
) -> RecurrentLearner:
    r"""Makes a learner out of a recurrent core and a readout, which it trains in place every T steps.

    Each chunk of T steps descends $\frac1T\sum_t L_t + \beta\,\langle G(s_T), s_T\rangle$, where $L_t$ is the mean loss of a step and G
    what the bootstrap says of the gradient from beyond.

    Args:
        core: PyTorch's RNN, GRU, LSTM or their cells; or any module that maps (inputs, state) to (outputs, state), for a stretch
            (steps, m, ...) or for one step (m, ...), and begins with ``None`` or its own ``initial_state(samples)``. The state is a
            tensor or a tree of tensors.
        readout: Maps outputs (n, features) to what the loss takes.
        horizon: T, 1 or more.
        bootstrap: A `Bootstrap`, or its name: none, dni, ...
        loss: Maps scores (n, ...) and targets (n, ...) to a scalar, a mean over n.
        optimizer: Maps the list of trainable parameters of core and readout to an optimizer.
        auxiliary: Whether the core also learns to foretell the synthetic gradient at the end of the next chunk.
        clip_norm: Longest gradient, its 2-norm, above 0; any if ``None``.
        accumulate: Chunks whose mean gradient makes one step of the optimizer, 1 or more.

    Raises:
        ValueError: If a number is out of range, or there is nothing to train or to foretell.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch, lockfree as lf
        >>> learner = lf.recurrent.convert(
        ...     torch.nn.LSTM(5, 16), torch.nn.Linear(16, 5), horizon=4, bootstrap="dni", loss=torch.nn.functional.cross_entropy,
        ...     optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        ... )
        >>> inputs, targets = torch.randn(12, 8, 5), torch.randint(0, 5, (12, 8))
        >>> learner.step(inputs, targets).updates
        3

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section 3.1.
    """
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"horizon={horizon!r}: give a whole number of steps, 1 or more")
    for name, module in (("core", core), ("readout", readout)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    found = choose(BOOTSTRAPS, bootstrap, "bootstrap")() if isinstance(bootstrap, str) else bootstrap
    if not isinstance(found, Bootstrap):
        raise TypeError(f"bootstrap must be one such as lockfree.recurrent.SyntheticGradient(), or its name, got {bootstrap!r}")
    if not callable(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a function such as lambda params: torch.optim.Adam(params, lr=1e-3), got {kind}")
    if auxiliary and isinstance(found, NoBootstrap):
        raise ValueError(
            "the auxiliary task foretells synthetic gradients, of which there are none: give a bootstrap, such as 'dni'"
        )
    parameters = _trained([core, readout])
    if not parameters:
        raise ValueError("neither core nor readout has a parameter that requires a gradient: there is nothing to train")
    update = Update(optimizer(parameters), every=accumulate, clip_norm=clip_norm)
    return RecurrentLearner(
        core, readout, horizon=horizon, bootstrap=found, objective=Objective(loss), update=update, auxiliary=auxiliary
    )


def _trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trainable parameters of modules, each once."""
    found = {id(parameter): parameter for module in modules for parameter in module.parameters() if parameter.requires_grad}
    return list(found.values())
