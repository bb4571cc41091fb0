"""The commands of the command line, a file each."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lockfree.commands.advise import Advise
from lockfree.commands.bench import Bench
from lockfree.commands.compare import Compare
from lockfree.commands.data import Data
from lockfree.commands.probe import Look
from lockfree.commands.replay import Replay
from lockfree.commands.reproduce import Reproduce
from lockfree.commands.rules import Cite, Rules
from lockfree.commands.simulate import Simulate
from lockfree.commands.train import Train


@runtime_checkable
class Command(Protocol):
    """One command, its arguments parsed."""

    def run(self, argv: Sequence[str]) -> None:
        """Does it; raises ValueError or OSError for what the user can mend."""
        ...


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "compare": Compare,
    "advise": Advise,
    "rules": Rules,
    "cite": Cite,
    "data": Data,
    "bench": Bench,
    "probe": Look,
    "replay": Replay,
    "reproduce": Reproduce,
    "simulate": Simulate,
}
"""Every command by its name."""
