"""Recurrent networks that learn every T steps, and past them: truncated backpropagation through time with a bootstrap at the horizon."""

from lockfree.recurrent import tasks
from lockfree.recurrent.bootstrap import Bootstrap, Border, Estimator, NoBootstrap, Oracle, Report, Site
from lockfree.recurrent.convert import BOOTSTRAPS, convert
from lockfree.recurrent.cores import Encoded, OneHot, Stacked
from lockfree.recurrent.learner import Learnt, RecurrentLearner
from lockfree.recurrent.solved import LeastSquaresGradient
from lockfree.recurrent.state import Layout, State
from lockfree.recurrent.synthetic import StateSynthesiser, Synthesised, SyntheticGradient
from lockfree.recurrent.trainer import TaskTrainer

__all__ = [
    "BOOTSTRAPS",
    "Bootstrap",
    "Border",
    "Encoded",
    "Estimator",
    "Layout",
    "Learnt",
    "LeastSquaresGradient",
    "NoBootstrap",
    "OneHot",
    "Oracle",
    "RecurrentLearner",
    "Report",
    "Site",
    "Stacked",
    "State",
    "StateSynthesiser",
    "Synthesised",
    "SyntheticGradient",
    "TaskTrainer",
    "convert",
    "tasks",
]
