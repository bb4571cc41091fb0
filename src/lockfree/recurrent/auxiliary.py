"""The auxiliary task: say at the beginning of a chunk what the synthetic gradient at its end will be."""

from typing import Any

import torch
from torch import Tensor, nn

from lockfree.recurrent.bootstrap import Site
from lockfree.recurrent.network import Network, Piece
from lockfree.synthesisers.base import zero


class Auxiliary(nn.Module):
    r"""A head that predicts, from the state $s_t$, the synthetic gradient $G(s_{t+T})$: $\frac{1}{2m}\sum_n\lVert h(s_n)-G(s'_n)\rVert^2$.

    What it descends reaches the core, which is made to keep in mind what the future will want. The chunk that made $s_t$ has been
    learnt by the time that $G(s_{t+T})$ is known, so its last step is run once more, at the present weights.

    Args:
        site: Where it stands.
        learning_rate: Of its Adam, above 0.

    Reference:
        Jaderberg et al. 2016, arXiv 1608.05343, section 3.1 (auxiliary task) and table 1 ("DNI + Aux").
    """

    def __init__(self, site: Site, learning_rate: float = 1e-3) -> None:
        super().__init__()
        width = site.layout.width
        place: dict[str, Any] = {"dtype": site.rows.dtype, "device": site.rows.device}
        self.layers = nn.Sequential(nn.Linear(width, width, **place), nn.ReLU(), zero(nn.Linear(width, width, **place)))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, fused=True)

    def loss(self, network: Network, last: Piece, known: Tensor | None, synthetic: Tensor) -> Tensor:
        """Returns the loss, in a graph of the core's last step before the chunk.

        Args:
            network: The core.
            last: The last piece before the chunk.
            known: Samples that tell something, (m,): no sequence ended since; ``None``: all.
            synthetic: The synthetic gradient at the end of the chunk, (m, width), detached.
        """
        _, state = network.run(last.inputs, last.state, last.done)
        difference = self.layers(network.layout.rows(state)) - synthetic
        if known is not None:
            difference = difference * known.unsqueeze(1)
        return 0.5 * difference.square().sum() / len(difference)
