"""Optimizers' steps for stacked parameters: in closed form for those that everyone uses, the optimizer's own for any other."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as optimizers

from lockfree.stacking import Descent, ParameterStack
from lockfree.update import Update


class StackedUpdate(Descent):
    """The steps of one optimizer for stacks; what else it steps is left to it.

    Args:
        update: What owns the optimizer.
        stacks: The parameters that will be followed.
    """

    def __init__(self, update: Update, stacks: Sequence[ParameterStack]) -> None:
        self._update, self._stacks = update, list(stacks)

    @staticmethod
    def serves(update: Update, stacks: Sequence[ParameterStack]) -> bool:
        """Whether this is how the optimizer steps."""
        return True

    @staticmethod
    def ready(update: Update, stacks: Sequence[ParameterStack]) -> bool:
        """Whether the optimizer keeps all that it will: some of it is made in a parameter's first step."""
        return True

    @property
    def holds(self) -> bool:
        """Whether the optimizer's state is still the one that was stacked, and its step the one that is taken here."""
        return True

    @property
    def settings(self) -> object:
        """The numbers in its operations, which change only if these do; ``None`` if it does not take the same ones each time."""
        return None

    def finish(self, others: bool) -> None:
        """Ends the tick's step.

        Args:
            others: Whether gradients lie on parameters that are in no stack, too.
        """
        if others:
            self._update.take()


class ByGradients(StackedUpdate):
    """Any optimizer: each parameter is given its gradient, and the optimizer takes its own step."""

    def follow(self, stack: ParameterStack, gradient: Tensor) -> None:
        for member, one in zip(stack.members, gradient.unbind(), strict=True):
            member.grad = one

    def finish(self, others: bool) -> None:
        self._update.take()


def _plain(optimizer: torch.optim.Optimizer, groups: Iterable[dict[str, Any]], forbidden: Sequence[str]) -> bool:
    """Whether nothing is hooked to an optimizer's step and none of its groups uses what is not served here."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        optimizers._global_optimizer_pre_hooks,
        optimizers._global_optimizer_post_hooks,
    )
    return not any(hooks) and not any(isinstance(group["lr"], Tensor) or any(map(group.get, forbidden)) for group in groups)


def _groups(optimizer: torch.optim.Optimizer, stacks: Sequence[ParameterStack]) -> list[dict[str, Any]] | None:
    """Returns the group that each stack belongs to; ``None`` if one belongs to several."""
    owner = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    found = [{id(owner[id(member)]): owner[id(member)] for member in stack.members} for stack in stacks]
    return [next(iter(groups.values())) for groups in found] if all(len(groups) == 1 for groups in found) else None


def _distinct(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({id(group): group for group in groups}.values())


_NOT_BY_SGD = ("nesterov", "maximize", "differentiable")
_NOT_BY_ADAM = ("differentiable", "capturable")


class BySGD(StackedUpdate):
    r"""`torch.optim.SGD`: $b \leftarrow \mu b + (1-d)(g + \lambda w)$, $w \leftarrow w - \eta b$; without momentum part of the product.

    Momentum buffers become views of a stack, too.
    """

    def __init__(self, update: Update, stacks: Sequence[ParameterStack]) -> None:
        super().__init__(update, stacks)
        optimizer = update.optimizer
        groups = _groups(optimizer, stacks)
        assert groups is not None, "asked of `serves`"
        self._group = dict(zip(map(id, stacks), groups, strict=True))
        self._groups = _distinct(groups)
        self._state = optimizer.state
        self._momentum: dict[int, Tensor] = {}
        for stack, group in zip(stacks, groups, strict=True):
            if group["momentum"]:
                states = [optimizer.state[member] for member in stack.members]
                whole = self._momentum[id(stack)] = torch.stack([state["momentum_buffer"] for state in states])
                for state, view in zip(states, whole.unbind(), strict=True):
                    state["momentum_buffer"] = view

    @staticmethod
    def serves(update: Update, stacks: Sequence[ParameterStack]) -> bool:
        optimizer = update.optimizer
        if type(optimizer) is not torch.optim.SGD or not update.plain:
            return False
        groups = _groups(optimizer, stacks)
        return groups is not None and _plain(optimizer, groups, _NOT_BY_SGD)

    @staticmethod
    def ready(update: Update, stacks: Sequence[ParameterStack]) -> bool:
        state = update.optimizer.state
        pairs = zip(stacks, _groups(update.optimizer, stacks) or [], strict=True)
        moving = [member for stack, group in pairs if group["momentum"] for member in stack.members]
        return all(state.get(member, {}).get("momentum_buffer") is not None for member in moving)

    @property
    def holds(self) -> bool:
        optimizer = self._update.optimizer
        moving = all(bool(self._group[key]["momentum"]) == (key in self._momentum) for key in self._group)
        return moving and optimizer.state is self._state and _plain(optimizer, self._groups, _NOT_BY_SGD)

    @property
    def settings(self) -> object:
        return [[group[name] for name in ("lr", "momentum", "dampening", "weight_decay")] for group in self._groups]

    def follow(self, stack: ParameterStack, gradient: Tensor) -> None:
        group, momentum = self._group[id(stack)], self._momentum.get(id(stack))
        if momentum is None:
            self._shrink(stack, group)
            stack.value.add_(gradient, alpha=-group["lr"])
        else:
            momentum.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
            self._move(stack, group, momentum)

    def follow_product(self, stack: ParameterStack, left: Tensor, right: Tensor) -> None:
        group, momentum = self._group[id(stack)], self._momentum.get(id(stack))
        if momentum is None:
            kept = 1 - group["lr"] * group["weight_decay"]
            stack.value.baddbmm_(left, right, beta=kept, alpha=-group["lr"])
        else:
            momentum.baddbmm_(left, right, beta=group["momentum"], alpha=1 - group["dampening"])
            self._move(stack, group, momentum)

    def _shrink(self, stack: ParameterStack, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            stack.value.mul_(1 - group["lr"] * group["weight_decay"])

    def _move(self, stack: ParameterStack, group: dict[str, Any], momentum: Tensor) -> None:
        if group["weight_decay"]:
            momentum.add_(stack.value, alpha=group["weight_decay"] * (1 - group["dampening"]))
        stack.value.add_(momentum, alpha=-group["lr"])


class ByAdam(StackedUpdate):
    """`torch.optim.Adam` and `AdamW`: one call of PyTorch's fused kernel with all parameters, each with its own count of steps.

    Counts of steps become views of one tensor.
    """

    def __init__(self, update: Update, stacks: Sequence[ParameterStack]) -> None:
        super().__init__(update, stacks)
        optimizer = update.optimizer
        groups = _groups(optimizer, stacks)
        assert groups is not None, "asked of `serves`"
        self._state = optimizer.state
        self._gradients = {id(stack): torch.empty_like(stack.value) for stack in stacks}
        by_group: dict[int, tuple[dict[str, Any], list[ParameterStack]]] = {}
        for stack, group in zip(stacks, groups, strict=True):
            by_group.setdefault(id(group), (group, []))[1].append(stack)
        self._calls = [(group, *self._lists(optimizer, members)) for group, members in by_group.values()]

    def _lists(self, optimizer: torch.optim.Optimizer, stacks: Sequence[ParameterStack]) -> tuple[Tensor, list[list[Tensor]]]:
        members = [member for stack in stacks for member in stack.members]
        states = [optimizer.state[member] for member in members]
        steps = torch.stack([state["step"] for state in states])
        for state, view in zip(states, steps.unbind(), strict=True):
            state["step"] = view
        gradients = [one for stack in stacks for one in self._gradients[id(stack)].unbind()]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        longest = [state["max_exp_avg_sq"] for state in states if "max_exp_avg_sq" in state]
        return steps, [[member.detach() for member in members], gradients, first, second, longest, list(steps.unbind())]

    @staticmethod
    def serves(update: Update, stacks: Sequence[ParameterStack]) -> bool:
        optimizer = update.optimizer
        if type(optimizer) not in _FUSED or not update.plain:
            return False
        groups = _groups(optimizer, stacks)
        if groups is None or not _plain(optimizer, groups, _NOT_BY_ADAM):
            return False
        # On an accelerator the kernel wants counts of steps there, where only a fused optimizer keeps them.
        placed = all(stack.value.device.type == "cpu" or group["fused"] for stack, group in zip(stacks, groups, strict=True))
        return placed and all(stack.value.dtype in _SERVED for stack in stacks)

    @staticmethod
    def ready(update: Update, stacks: Sequence[ParameterStack]) -> bool:
        return all(member in update.optimizer.state for stack in stacks for member in stack.members)

    @property
    def holds(self) -> bool:
        optimizer = self._update.optimizer
        return optimizer.state is self._state and _plain(optimizer, [group for group, *_ in self._calls], _NOT_BY_ADAM)

    @property
    def settings(self) -> object:
        return [[group[name] for name in ("lr", "betas", *_ADAMS)] for group, *_ in self._calls]

    def follow(self, stack: ParameterStack, gradient: Tensor) -> None:
        self._gradients[id(stack)].copy_(gradient)

    def follow_product(self, stack: ParameterStack, left: Tensor, right: Tensor) -> None:
        torch.bmm(left, right, out=self._gradients[id(stack)])

    def finish(self, others: bool) -> None:
        step = _FUSED[type(self._update.optimizer)]
        for group, steps, lists in self._calls:
            steps.add_(1)
            beta1, beta2 = group["betas"]
            step(*lists, lr=group["lr"], beta1=beta1, beta2=beta2, **{name: group[name] for name in _ADAMS})
        super().finish(others)


_FUSED: dict[type, Callable[..., None]] = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}
_ADAMS = ("weight_decay", "eps", "amsgrad", "maximize")
_SERVED = (torch.float32, torch.float64)


def stacked_update(update: Update, stacks: Sequence[ParameterStack]) -> StackedUpdate | None:
    """Returns the fastest way of stepping these stacks; ``None``: it has to step each parameter in its own way once more."""
    kind = next(kind for kind in (BySGD, ByAdam, ByGradients) if kind.serves(update, stacks))
    return kind(update, stacks) if kind.ready(update, stacks) else None
