"""`lockfree advise`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import tyro
from torch.nn import functional as F

from lockfree.advise import advise, parse_memory
from lockfree.advise.own_model import make_model
from lockfree.choose import choose
from lockfree.commands.shared import known_rule, names_in
from lockfree.console import candidates
from lockfree.experiment import OPTIMIZERS, check_device, load_once


@dataclass(frozen=True, kw_only=True)
class Advise:
    """Measure what could replace backprop for a model of your own, and say whether anything should.

    Attributes:
        model: Your model, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION: a function that returns it, given nothing or
            (input_shape, classes); or one of the package's: mlp, cnn, lenet, vgg8b, resnet20, vit.
        memory: What training may take, such as 2GB or 512MiB; no limit if left out.
        data: Data set; `lockfree data list` lists them. One in five of its training samples, 5,000 at most, is held out to score on.
        rules: Names of rules to measure beside backprop and checkpoint, with commas; all of them if left out.
        blocks: Where to cut: auto (the children, and other cuts where that is deep or memory is tight), children, a number of
            blocks, or names of modules to begin at, with commas.
        batch_size: Samples in a step, 1 or more.
        optimizer: adam, or sgd (with momentum 0.9).
        learning_rate: Of the blocks' optimizer, above 0.
        seconds: About how long all of it may take.
        steps: How many steps to train each rule for instead, however long that takes.
        seed: Decides initial weights, what is held out, the order of the data and dropout.
        device: Where to measure: cpu, cuda, cuda:1, ...
        json: Print one JSON object.
    """

    model: tyro.conf.Positional[str]
    memory: str | None = None
    data: str = "fashion-mnist"
    rules: str | None = None
    blocks: str = "auto"
    batch_size: int = 256
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    seconds: float = 150.0
    steps: int | None = None
    seed: int = 0
    device: str = "cpu"
    json: bool = False

    def run(self, argv: Sequence[str]) -> None:
        """Measures, and prints the advice."""
        rules = None if self.rules is None else names_in(self.rules)
        for name in rules or ():
            known_rule(name)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number above 0")
        make = choose(OPTIMIZERS, self.optimizer, "optimizer")
        memory = None if self.memory is None else parse_memory(self.memory)
        check_device(self.device)
        dataset = load_once(self.data, self.device)
        torch.manual_seed(self.seed)
        model = make_model(self.model, dataset.input_shape, len(dataset.classes)).to(self.device)
        with candidates(quiet=self.json) as show:
            advice = advise(
                model,
                *dataset.train,
                F.cross_entropy,
                optimizer=lambda parameters: make(parameters, lr=self.learning_rate),
                memory=memory,
                rules=rules,
                blocks=_blocks(self.blocks),
                batch_size=self.batch_size,
                seconds=self.seconds,
                steps=self.steps,
                seed=self.seed,
                progress=show,
            )
        if self.json:
            print(json.dumps({"model": self.model, "data": self.data, "device": self.device} | advice.to_dict()))
            return
        print(advice)


def _blocks(written: str) -> str | int | list[str] | None:
    """Reads where to cut."""
    if written in ("auto", "children"):
        return None if written == "children" else written
    return int(written) if written.isdecimal() else names_in(written)
