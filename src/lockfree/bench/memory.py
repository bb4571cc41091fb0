"""What a chain of equal blocks holds in a step: local rules beside backpropagation, measured in two ways, and what it takes."""

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockfree.bench.step import STEP_OPTIMIZERS, machine
from lockfree.bench.timing import interleaved, ratio
from lockfree.convert import convert
from lockfree.learner import Learner
from lockfree.memory import ActivationMeter

LOCAL = ("pred", "predsim", "mono", "dgl", "auglocal", "infopro", "drtp", "hsic")
"""Rules under which a block learns, and lets its activations go, before the next one runs."""

_CLASSES, _MIB = 10, 2**20


@dataclass(frozen=True)
class Size:
    """How large the blocks of a chain are; a tensor between two of them has ``4 * channels * side**2 * batch`` bytes.

    Attributes:
        channels: Of every block's input and output.
        side: Pixels a side.
        batch: Images in a batch.
    """

    channels: int = 32
    side: int = 16
    batch: int = 256


def memory(
    blocks: int = 16,
    rounds: int = 3,
    repeats: int = 3,
    device: str = "cpu",
    rules: Sequence[str] = LOCAL,
    size: Size = Size(),
) -> dict[str, Any]:
    """Measures what chains of 1, 2 and many equal blocks hold in a training step, and times the long ones.

    The chain is `chain`; each rule trains it with the command line's own optimizer (fused Adam). ``saved`` is what autograd keeps for
    backward passes (`saved`), ``process`` by how much a process of its own grows in a step (`process`), which has what backward passes
    make on their way, too, and the gradients of parameters. Steps of a rule and of backpropagation are timed in turn.

    A chain of 2 is measured since a rule may give the last local block less to do than those below: InfoPro no decoder, AugLocal no
    copy of a block above.

    Args:
        blocks: Equal blocks in the long chain, more than 2.
        rounds: Timed steps of each thing in a repeat.
        repeats: How often times are measured; the medians over the repeats are returned.
        device: Where to train.
        rules: Names of the rules to measure beside backpropagation and gradient checkpointing.
        size: Of the blocks.

    Returns:
        For each rule MiB by number of blocks, the long chain over the short ones and over backpropagation, the ratio of times and its
        range; milliseconds of backpropagation's steps, and what the machine was.
    """
    found: dict[str, Any] = {}
    for rule in ("backprop", "checkpoint", *rules):
        for way, measure in (("saved", saved), ("process", process)):
            held = {count: measure(rule, count, size, device) for count in (1, 2, blocks)}
            found |= {f"{rule}_{count}_{way}_mib": value / _MIB for count, value in held.items()}
            found |= {f"{rule}_{blocks}_over_{count}_{way}": held[blocks] / held[count] for count in (1, 2)}
            if rule != "backprop":
                whole = found[f"backprop_{blocks}_{way}_mib"]
                found[f"{rule}_over_backprop_{way}"] = held[blocks] / _MIB / whole
    return {
        **found,
        **_times(("checkpoint", *rules), blocks, size, device, rounds=rounds, repeats=repeats),
        "blocks": blocks,
        "channels": size.channels,
        "side": size.side,
        "batch": size.batch,
        "rounds": rounds,
        "repeats": repeats,
        **machine(device),
    }


def chain(blocks: int, size: Size) -> nn.Sequential:
    """Makes a stem of one 1 x 1 convolution from 3 channels, equal blocks (3 x 3 convolution, BatchNorm, ReLU), and a head.

    The head, a mean over places and a matrix, is a block of its own, so that all equal ones learn as the rule has it.

    Args:
        blocks: How many equal ones.
        size: Theirs.
    """
    width = size.channels
    equal = (nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(blocks))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, _CLASSES))
    return nn.Sequential(nn.Conv2d(3, width, 1), *equal, head)


def saved(rule: str, blocks: int, size: Size, device: str = "cpu") -> int:
    """Returns the most bytes that autograd keeps at once in a step; parameters, those of auxiliary networks too, do not count.

    What checkpointing makes anew on the way down is hidden from the count, which has the borders between blocks alone.

    Args:
        rule: Its command-line name.
        blocks: Equal blocks in the chain.
        size: Theirs.
        device: Where to train.
    """
    learner, x, y = _training(rule, blocks, size, device)
    learner.step(x[:2], y[:2])
    meter = ActivationMeter(learner.model, *learner.auxiliaries)
    with meter.watch():
        learner.step(x, y)
    return meter.peak


def process(rule: str, blocks: int, size: Size, device: str = "cpu") -> int:
    """Returns by how many bytes a process of its own grows at most, in three steps, over what it held before them.

    Before them there are the model, the auxiliary networks, the batch, and, by a step on two samples, the optimizers' state and
    whatever else is made once. On a CPU this is resident memory (Linux alone tells its peak), and freed tensors are given back to the
    system at once (glibc's ``MALLOC_MMAP_THRESHOLD_``); on CUDA it is what PyTorch has allocated.

    Args:
        rule: Its command-line name.
        blocks: Equal blocks in the chain.
        size: Theirs.
        device: Where to train.

    Raises:
        ChildProcessError: If the process fails; its last words are in the message.
    """
    asked = json.dumps([rule, blocks, astuple(size), device, torch.get_num_threads()])
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, asked], env=os.environ | _GIVE_BACK, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise ChildProcessError(f"the process that was to measure {rule} with {blocks} blocks {_end_of(child)}")
    return int(child.stdout.split()[-1])


_CHILD = "from lockfree.bench.memory import _answer; _answer()"
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _end_of(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        return f"was ended by {signal.Signals(-child.returncode).name}: is there enough memory?"
    words = child.stderr.strip().splitlines()
    return f"failed: {words[-1] if words else f'exit code {child.returncode}'}"


def _answer() -> None:
    """What the process of its own does: measures what it is asked for, and prints it."""
    rule, blocks, size, device, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    learner, x, y = _training(rule, blocks, Size(*size), device)
    learner.step(x[:2], y[:2])
    before, peak = _gauge(device)
    for _ in range(3):
        learner.step(x, y)
    print(peak() - before)


def _gauge(device: str) -> tuple[int, Callable[[], int]]:
    """Returns the bytes in use, and what tells the most that have been since."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # where it is not permitted, the peak since the process began has to do
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS"), lambda: _resident("VmHWM")


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError(f"the peak of a process is read from {status}, which only Linux has: measure there, or on cuda")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def _training(rule: str, blocks: int, size: Size, device: str) -> tuple[Learner, Tensor, Tensor]:
    """Returns a learner of the chain, and a batch."""
    torch.manual_seed(0)
    network = chain(blocks, size).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, 3, size.side, size.side, generator=generator).to(device)
    y = torch.randint(0, _CLASSES, (size.batch,), generator=generator).to(device)
    learner = convert(network, rule, loss=F.cross_entropy, optimizer=STEP_OPTIMIZERS["fused"], example_input=x[:2])
    return learner, x, y


def _step(rule: str, blocks: int, size: Size, device: str) -> Callable[[], object]:
    learner, x, y = _training(rule, blocks, size, device)
    return lambda: learner.step(x, y).loss


def _times(rules: Sequence[str], blocks: int, size: Size, device: str, *, rounds: int, repeats: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {f"{rule}_over_backprop_time": [] for rule in rules}
    backprop: list[float] = []
    for _, rule in itertools.product(range(repeats), rules):
        steps = {name: _step(name, blocks, size, device) for name in (rule, "backprop")}
        seconds = interleaved(steps, rounds=rounds, warm_up=1)
        found[f"{rule}_over_backprop_time"].append(ratio(seconds, rule, "backprop"))
        backprop += seconds["backprop"]
    return {
        **{name: statistics.median(values) for name, values in found.items()},
        **{f"{name}_range": [min(values), max(values)] for name, values in found.items()},
        "backprop_milliseconds": 1e3 * statistics.median(backprop),
    }
