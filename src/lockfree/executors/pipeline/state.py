"""A learner's state, of which each process knows a part."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lockfree.cell import Cell
from lockfree.executors.base import Assembly
from lockfree.update import Update


def tensors_of(assembly: Assembly, cells: range) -> list[Tensor]:
    """Returns the parameters and buffers that some cells change, each once."""
    found = (tensor for cell in assembly.cells[cells.start : cells.stop] for tensor in _held(cell))
    return list({id(tensor): tensor for tensor in found}.values())


def _held(cell: Cell) -> Iterable[Tensor]:
    for network in (cell.block, cell.auxiliary, cell.inputs):
        if network is not None:
            yield from network.parameters()
            yield from network.buffers()


def part(model: nn.Module, assembly: Assembly, state: Mapping[str, Any], own: range) -> dict[str, Any]:
    """Returns what a process knows better than the others.

    Args:
        model: The user's own.
        assembly: What is worked on.
        state: What `Learner.state_dict` says here.
        own: The cells of this process.
    """
    mine = {id(tensor) for tensor in tensors_of(assembly, own)}
    held = _named(model)
    return {
        "model": {name: value for name, value in state["model"].items() if id(held.get(name)) in mine},
        "cells": {index: state["cells"][index] for index in own},
        "up": {index: link["up"] for index, link in enumerate(state["links"]) if index + 1 in own},
        "down": {index: link["down"] for index, link in enumerate(state["links"]) if index in own},
        "flights": state["flights"],
        "optimizer": _own_states(assembly.blocks, state["optimizer"], mine),
        "auxiliary_optimizer": _own_states(assembly.auxiliaries, state["auxiliary_optimizer"], mine),
        "updates": [
            _own_gathered(update, saved, mine)
            for update, saved in zip((assembly.blocks, assembly.auxiliaries), state["updates"], strict=True)
        ],
        "rng": state["rng"],
    }


def whole(state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the state with everything as the process says that knows it.

    Args:
        state: What `Learner.state_dict` says in one of them.
        parts: The `part` of each.
    """

    def joined(name: str) -> dict[Any, Any]:
        return {key: value for one in parts for key, value in one[name].items()}

    found = dict(state)
    found["model"] = {**state["model"], **joined("model")}
    found["cells"] = [value for _, value in sorted(joined("cells").items())]
    up, down = joined("up"), joined("down")
    found["links"] = [{"up": up[index], "down": down[index]} for index in range(len(state["links"]))]
    found["flights"] = _flights([one["flights"] for one in parts])
    for name in ("optimizer", "auxiliary_optimizer"):
        if state[name] is not None:
            found[name] = {**state[name], "state": {**state[name]["state"], **joined(name)}}
    found["updates"] = [
        saved and {**saved, "gathered": _merged([one["updates"][index] for one in parts])}
        for index, saved in enumerate(state["updates"])
    ]
    found["rng"] = parts[0]["rng"]
    return found


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _stepped(update: Update | None) -> list[Tensor]:
    """Returns what an optimizer steps, in the order in which its state counts them."""
    return [] if update is None else [one for group in update.optimizer.param_groups for one in group["params"]]


def _own_states(update: Update | None, saved: Mapping[str, Any] | None, mine: set[int]) -> dict[int, Any]:
    if saved is None:
        return {}
    own = {index for index, parameter in enumerate(_stepped(update)) if id(parameter) in mine}
    return {index: value for index, value in saved["state"].items() if index in own}


def _own_gathered(update: Update | None, saved: Mapping[str, Any] | None, mine: set[int]) -> list[Tensor | None]:
    gathered = saved["gathered"] if saved else []
    return [one if id(parameter) in mine else None for parameter, one in zip(_stepped(update), gathered, strict=False)]


def _merged(lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    return [next((one for one in column if one is not None), None) for column in zip(*lists, strict=True)]


def _flights(known: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    """Joins what processes know of batches in flight: each counts the actions of its own cells."""
    found: dict[int, dict[str, Any]] = {}
    for flights in known:
        for batch, flight in flights.items():
            if batch not in found:
                found[batch] = dict(flight)
                continue
            one = found[batch]
            one["remaining"] += flight["remaining"]
            for name in ("error", "scores"):
                one[name] = flight[name] if one[name] is None else one[name]
    return dict(sorted(found.items()))
