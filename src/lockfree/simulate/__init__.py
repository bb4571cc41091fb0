"""Predictions of what training takes on many workers: from the times of blocks and links to step time, bubble, memory, staleness."""

from lockfree.simulate.costs import DIRECT, Costs, Transport
from lockfree.simulate.measure import measure
from lockfree.simulate.pipelines import delayed_backprop, from_schedule, gpipe, one_forward_one_backward, schedule_at_work
from lockfree.simulate.plan import Event, Plan, play
from lockfree.simulate.predict import METHODS, PIPELINES, Prediction, Setting, plan_for, predict, simulate
from lockfree.simulate.steady import Steady, steady_state

__all__ = [
    "DIRECT",
    "METHODS",
    "PIPELINES",
    "Costs",
    "Event",
    "Plan",
    "Prediction",
    "Setting",
    "Steady",
    "Transport",
    "delayed_backprop",
    "from_schedule",
    "gpipe",
    "measure",
    "one_forward_one_backward",
    "plan_for",
    "play",
    "predict",
    "schedule_at_work",
    "simulate",
    "steady_state",
]
