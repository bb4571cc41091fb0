"""Experiments of papers, and our own: one function each, one line each here; `lockfree reproduce NAME` runs one."""

from collections.abc import Callable

from lockfree.recipes.clock_trial import ClockTrial
from lockfree.recipes.critics import sobolev_critics
from lockfree.recipes.czarnecki2017 import sg_artificial, sg_deep, sg_representations, sg_table
from lockfree.recipes.gradient_noise import dni_noise
from lockfree.recipes.jaderberg2016 import dni_sparse_updates, dni_table1, dni_unlocked
from lockfree.recipes.jaderberg2016_recurrent import dni_char_lm, dni_copy, dni_repeat_copy
from lockfree.recipes.layer_trial import LayerTrial
from lockfree.recipes.linear_trial import LinearTrial
from lockfree.recipes.ma2019 import hsic_depth, hsic_format, hsic_resnet, hsic_sigma, hsic_unformatted
from lockfree.recipes.multi_network import dni_multi_network
from lockfree.recipes.recipe import Recipe
from lockfree.recipes.rule_trial import RuleTrial
from lockfree.recipes.run import run
from lockfree.recipes.server_trial import ServerTrial
from lockfree.recipes.shang2019 import alternating_lm
from lockfree.recipes.stragglers import stragglers
from lockfree.recipes.trial import Trial
from lockfree.recipes.zheng2017 import dc_asgd_cifar, dc_asgd_sweep

RECIPES: dict[str, Callable[[str], Recipe]] = {
    "dni-table1": dni_table1,
    "dni-sparse-updates": dni_sparse_updates,
    "dni-unlocked": dni_unlocked,
    "dni-noise": dni_noise,
    "dni-copy": dni_copy,
    "dni-repeat-copy": dni_repeat_copy,
    "dni-char-lm": dni_char_lm,
    "alternating-lm": alternating_lm,
    "dni-multi-network": dni_multi_network,
    "sobolev-critics": sobolev_critics,
    "sg-table": sg_table,
    "sg-artificial": sg_artificial,
    "sg-deep": sg_deep,
    "sg-representations": sg_representations,
    "hsic-unformatted": hsic_unformatted,
    "hsic-format": hsic_format,
    "hsic-sigma": hsic_sigma,
    "hsic-resnet": hsic_resnet,
    "hsic-depth": hsic_depth,
    "dc-asgd-cifar": dc_asgd_cifar,
    "dc-asgd-sweep": dc_asgd_sweep,
    "stragglers": stragglers,
}
"""Every recipe by its command-line name; it takes a budget: smoke, small or full."""

__all__ = ["RECIPES", "ClockTrial", "LayerTrial", "LinearTrial", "Recipe", "RuleTrial", "ServerTrial", "Trial", "run"]
