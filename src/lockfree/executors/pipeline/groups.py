"""Which process works on which blocks."""

import itertools
from collections.abc import Sequence

from lockfree.cell import Cell


def balanced(seconds: Sequence[float], count: int) -> list[int]:
    """Returns how many neighbours each of ``count`` groups takes, so that the slowest group is as fast as it can be.

    Args:
        seconds: Of each cell, bottom to top, 0 or more.
        count: Number of groups, 1 to the number of cells.

    Example:
        >>> balanced([1.0, 1.0, 1.0, 3.0], 2)
        [3, 1]
    """
    ends = [0.0, *itertools.accumulate(seconds)]
    cells = len(seconds)
    # best[k][n] = (slowest group, sum of squares, sizes) of the first n cells in k groups; among equals the most even one wins.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for made in range(1, count + 1):
        longer = {}
        for end in range(made, cells - (count - made) + 1):
            options = []
            for start, (slowest, squares, sizes) in best.items():
                if start < end:
                    mine = ends[end] - ends[start]
                    options.append((max(slowest, mine), squares + mine**2, [*sizes, end - start]))
            longer[end] = min(options)
        best = longer
    return best[cells][2]


def check(groups: Sequence[int], cells: Sequence[Cell], processes: int) -> None:
    """Refuses groups that do not fit.

    Raises:
        ValueError: If numbers do not add up, or blocks in two groups share a parameter or buffer.
    """
    if len(groups) != processes or min(groups) < 1 or sum(groups) != len(cells):
        raise ValueError(
            f"groups={list(groups)}: give a number of blocks, 1 or more, for each of {processes} processes, {len(cells)} in all"
        )
    owner: dict[int, tuple[int, int]] = {}
    numbers = itertools.chain.from_iterable([group] * size for group, size in enumerate(groups))
    for cell, group in zip(cells, numbers, strict=True):
        for tensor in (*cell.block.parameters(), *cell.block.buffers()):
            first, where = owner.setdefault(id(tensor), (cell.place.index, group))
            if where != group:
                raise ValueError(
                    f"blocks {first} and {cell.place.index} share a parameter or buffer, so they must learn in one process: cut the "
                    "model so that one block or one process holds both (blocks=, executor=Pipeline(groups=[...])), take fewer "
                    'processes, or use executor="sequential"'
                )


def ranges(groups: Sequence[int]) -> list[range]:
    """Returns the numbers of the cells of each group.

    Example:
        >>> ranges([2, 1])
        [range(0, 2), range(2, 3)]
    """
    ends = list(itertools.accumulate(groups))
    return [range(end - size, end) for size, end in zip(groups, ends, strict=True)]
