"""Recurrent networks that learn every T steps, and past them: truncated backpropagation through time with a bootstrap at the horizon."""

from lockfree.recurrent import tasks
from lockfree.recurrent.alternation import Alternating, WarmRestarts
from lockfree.recurrent.bootstrap import Bootstrap, Border, Estimator, NoBootstrap, Oracle, Report, Site
from lockfree.recurrent.clocks import Ticked, TwoClocks
from lockfree.recurrent.convert import BOOTSTRAPS, convert
from lockfree.recurrent.coordinatewise import CoordinatewiseSynthesiser
from lockfree.recurrent.cores import Encoded, OneHot, Stacked
from lockfree.recurrent.couplings import COUPLINGS, Coupled, Coupling, Decoupled, Severed
from lockfree.recurrent.eligibility import BPLambda
from lockfree.recurrent.learner import Learnt, RecurrentLearner
from lockfree.recurrent.remembering import RecurrentSynthesiser, Remembering
from lockfree.recurrent.scaled import Scaled, ScaledEstimator
from lockfree.recurrent.solved import LeastSquaresGradient
from lockfree.recurrent.state import Layout, State
from lockfree.recurrent.synthetic import StateSynthesiser, Synthesised, SyntheticGradient
from lockfree.recurrent.trainer import TaskTrainer

__all__ = [
    "BOOTSTRAPS",
    "COUPLINGS",
    "Alternating",
    "BPLambda",
    "Bootstrap",
    "Border",
    "CoordinatewiseSynthesiser",
    "Coupled",
    "Coupling",
    "Decoupled",
    "Encoded",
    "Estimator",
    "Layout",
    "Learnt",
    "LeastSquaresGradient",
    "NoBootstrap",
    "OneHot",
    "Oracle",
    "RecurrentLearner",
    "RecurrentSynthesiser",
    "Remembering",
    "Report",
    "Scaled",
    "ScaledEstimator",
    "Severed",
    "Site",
    "Stacked",
    "State",
    "StateSynthesiser",
    "Synthesised",
    "SyntheticGradient",
    "TaskTrainer",
    "Ticked",
    "TwoClocks",
    "WarmRestarts",
    "convert",
    "tasks",
]
