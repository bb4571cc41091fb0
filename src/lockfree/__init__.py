"""Train neural networks without the locks of backpropagation.

`convert` turns any PyTorch model and a rule into a learner; `Trainer` runs it over data.
"""

from lockfree import data, hsic, models, probes, recurrent, rules, server, staleness, synthesisers
from lockfree.advise import Advice, advise
from lockfree.chain import Block, Chain
from lockfree.convert import convert
from lockfree.cut import CannotCutError
from lockfree.learner import Learner, StepResult
from lockfree.link import Link
from lockfree.objective import Diverged
from lockfree.rule import Card, Clock, Context, Needs, Pace, Place, Rule, Site, Trained
from lockfree.run import Run, version
from lockfree.schedule import Action, Kind, Schedule
from lockfree.trainer import Evaluation, Summary, Trainer, evaluate

__version__ = version()

__all__ = [
    "Action",
    "Advice",
    "Block",
    "CannotCutError",
    "Card",
    "Chain",
    "Clock",
    "Context",
    "Diverged",
    "Evaluation",
    "Kind",
    "Learner",
    "Link",
    "Needs",
    "Pace",
    "Place",
    "Rule",
    "Run",
    "Schedule",
    "Site",
    "StepResult",
    "Summary",
    "Trained",
    "Trainer",
    "advise",
    "convert",
    "data",
    "evaluate",
    "hsic",
    "models",
    "probes",
    "recurrent",
    "rules",
    "server",
    "staleness",
    "synthesisers",
]
