"""What the tests of the server share: a small model with everything that could go wrong in it, data, a plain loop."""

import copy

import torch
from torch import nn

from lockfree.rng import generators_apart, seed_generators, seed_of
from lockfree.server import Batches, Server, Worker, train
from lockfree.staleness import ASP, NoCorrection

cross_entropy = nn.functional.cross_entropy


def sgd(weights):
    return torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=1e-3)


def plain(weights):
    return torch.optim.SGD(weights, lr=0.05)


def adam(weights):
    return torch.optim.Adam(weights, lr=0.01)


class Net(nn.Module):
    """Buffers, random draws, and a parameter that gets no gradient."""

    def __init__(self, seed=0, norm=True, drop=0.25):
        super().__init__()
        with generators_apart():
            seed_generators(seed)
            norms = [nn.BatchNorm1d(8)] if norm else []
            self.layers = nn.Sequential(nn.Linear(6, 8), *norms, nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 3))
            self.unused = nn.ParameterList([torch.ones(2)])
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x):
        return self.layers(x)


def smooth(seed=0):
    """No part of it depends on what else is in the batch."""
    return Net(seed, norm=False, drop=0.0)


def data(samples=48, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator)
    y = (x[:, :3] + 0.3 * torch.randn(samples, 3, generator=generator)).argmax(1)
    return x.to(dtype), y


def trained(model=None, given=None, **more):
    """Trains with what most tests want; all of it may be said otherwise."""
    settings = {
        "loss": cross_entropy,
        "optimizer": sgd,
        "workers": 4,
        "batch_size": 4,
        "updates": 24,
        "consistency": ASP(),
        "correction": NoCorrection(),
        "seed": 3,
        "fingerprints": 5,
    }
    return train(Net() if model is None else model, data() if given is None else given, **{**settings, **more})


def a_plain_loop(model, given, optimizer, *, batch_size, updates, seed=3, clip=None, schedule=None):
    """What somebody would write who has one worker and no server."""
    model.train()
    optimizer = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    scheduler = schedule(optimizer) if schedule else None
    batches = Batches(given, batch_size=batch_size, seed=seed)
    for ticket in range(updates):
        with generators_apart():
            seed_generators(seed_of(seed, ticket))
            x, y = batches(ticket)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def assert_same(one, other, **tolerance):
    """Compares the states of two models: bit for bit, unless something is tolerated."""
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(a, b), name


def served(model=None, given=None, batch_size=4, **settings):
    """A server and its worker."""
    model = Net() if model is None else model
    lines = []
    server = Server(model, **{"optimizer": sgd, "note": lines.append, **settings})
    worker = Worker(model, Batches(data() if given is None else given, batch_size=batch_size, seed=3), loss=cross_entropy)
    return server, worker, lines


def frozen(server):
    """All that a server is, to be compared."""
    found = copy.deepcopy(server.snapshot())
    found.pop("number")
    return found


def equal(one, other):
    """Compares trees of plain data and tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other
