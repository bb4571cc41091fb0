"""Does the simulator predict what two processes reach? Blocks are timed in one process, then the pipeline of two is run.

    python benchmarks/simulated_pipeline.py > benchmarks/results/simulated_pipeline.json

Network, rules and the way of measuring are those of `lockfree bench pipeline`. Blocks are timed while the other core is idle, so a machine
whose cores slow each other down is predicted too fast: by as much as ``two_over_one``, what two independent processes reach over one,
falls short of 2.
"""

import json
import statistics
from functools import partial

import torch
from torch.nn import functional as F

from lockfree.bench.pipeline import RULES, Contestant, Size, batches, measure_rates, network, pipelined, sequential, sgd
from lockfree.bench.step import machine
from lockfree.simulate import Transport, from_schedule, measure, predict
from lockfree.simulate.pipelines import schedule_at_work

SIZE = Size()
LINK = Transport(
    latency=1e-4, bandwidth=2e9
)  # gloo on the loopback, roughly: 0.1 ms for nothing, half a millisecond for a megabyte


def predicted(rule: str) -> float:
    """Returns the samples a second that two workers should reach, each with half of the blocks."""
    how, blocks = RULES[rule](SIZE)
    x, y = batches(SIZE)()
    costs = measure(network(SIZE), how, x, y, loss=F.cross_entropy, optimizer=sgd, blocks=blocks, rounds=10)
    workers = [int(2 * cell >= costs.cells) for cell in range(costs.cells)]
    plan = from_schedule(schedule_at_work(how, costs.cells), costs, transport=LINK, workers=workers)
    return SIZE.batch / predict(plan).period


def main() -> None:
    """Predicts, runs, prints."""
    torch.set_num_threads(1)
    found = {}
    for rule in RULES:
        expected = predicted(rule)
        contestants = {
            "two": Contestant(partial(sequential, rule=rule)),
            "one": Contestant(partial(sequential, rule=rule), ranks=(0,)),
            "pipeline": Contestant(partial(pipelined, rule=rule), together=True),
        }
        measured = measure_rates(contestants, SIZE, rounds=7, steps=6, patience=120.0)
        middle = {name: statistics.median(values) for name, values in measured.items()}
        found[rule] = {
            "predicted_samples_per_second": expected,
            "measured_samples_per_second": middle["pipeline"],
            "measured_over_predicted": middle["pipeline"] / expected,
            "two_over_one": middle["two"] / middle["one"],
        }
    print(json.dumps(found | machine("cpu")))


if __name__ == "__main__":
    main()
