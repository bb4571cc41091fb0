"""Probes: what they see is right, and they change nothing."""

import json
import re

import numpy as np
import pytest
import torch
from cases import MODELS, learner_for
from torch import nn
from torch.nn import functional as F

import lockfree as lf
from lockfree.cli import main
from lockfree.probes import PROBES, Activations, Alignment, Information, Probe, View

CASE = MODELS["mlp"]
NEW = ("gradient-quality", "implied-loss", "representation")


def learner(rule="backprop", seed=0):
    torch.manual_seed(seed)
    return lf.convert(
        CASE.build(),
        rule,
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        example_input=batches(1)[0][0],
    )


def batches(count, samples=32):
    return CASE.batches(count, samples=samples)


def sample():
    (batch,) = CASE.batches(1, seed=9, samples=40)
    return batch


class Nosy(Probe):
    """Does everything that a careless probe might do."""

    name, said = "nosy", "looks into everything"

    def look(self, view):
        torch.rand(3)
        view.learner.predict(view.inputs)
        return {"mode": view.learner.model.training, "norms": [float(z.norm()) for z in view.representations]}

    @classmethod
    def draw(cls, runs):
        raise NotImplementedError


@pytest.mark.parametrize("rule", ["backprop", "cdni", "hsic"])
@pytest.mark.parametrize("every", [1, 3, None])
def test_training_is_bit_for_bit_the_same_with_and_without_probes(rule, every):
    ends = []
    for probes in ((), (Information(every=every), Activations(every=every), Alignment(every=every), Nosy(every=2))):
        one = learner(rule)
        torch.manual_seed(5)  # dropout draws from the global generator
        lf.Trainer(one, probes=probes, probe_data=sample()).fit(batches(5), batches(1), epochs=2)
        ends.append(one.state_dict())
        drawn = torch.rand(4)
        ends[-1]["next"] = drawn
    assert json.dumps(_plain(ends[0])) == json.dumps(_plain(ends[1]))


def _plain(state):
    if isinstance(state, dict):
        return {str(key): _plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else str(state)


def test_probes_look_at_the_start_and_after_every_epoch_or_every_so_many_steps(tmp_path):
    trainer = lf.Trainer(
        learner(), run=tmp_path / "a", probes=[Information(), Activations(every=2)], probe_data=sample(), log_every=100
    )
    trainer.fit(batches(5), epochs=2)
    lines = lf.Run.open(tmp_path / "a").metrics("probe")
    looks = {name: [line["step"] for line in lines if line["probe"] == name] for name in PROBES}
    assert looks == {"information": [0, 5, 10], "activations": [2, 4, 6, 8, 10], "alignment": [], **{key: [] for key in NEW}}
    assert [line["epoch"] for line in lines if line["probe"] == "information"] == [0, 1, 2]


def test_a_resumed_run_has_each_look_once(tmp_path):
    for epochs, resume in ((1, False), (2, True)):
        one = lf.Trainer(learner(), run=tmp_path / "a", resume=resume, probes=[Information()], probe_data=sample())
        one.fit(batches(5), epochs=epochs)
    lf.Trainer(learner(), run=tmp_path / "b", probes=[Information()], probe_data=sample()).fit(batches(5), epochs=2)
    seen = [lf.Run.open(tmp_path / name).metrics("probe") for name in "ab"]
    took = [[line.pop("seconds") for line in lines] for lines in seen]
    assert seen[0] == seen[1]
    assert all(0 < seconds < 60 for lines in took for seconds in lines)
    assert [line["step"] for line in seen[0]] == [0, 5, 10]


def test_information_is_normalised_hsic_of_each_block_in_evaluation_mode():
    one = learner()
    one.step(*batches(1)[0])
    x, y = sample()
    seen = Information(sigma=2.0, epsilon=1e-3).look(View(one, x, y))
    one.model.eval()
    representations, values = [], x
    for child in one.model:
        values = child(values)
        representations.append(values.detach())

    def smoother(rows):
        rows = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
        distances = ((rows[:, None] - rows) ** 2).sum(-1)
        gram = np.exp(-distances / (2 * 4 * rows.shape[1]))
        centre = np.eye(len(rows)) - 1 / len(rows)
        gram = centre @ gram @ centre
        return gram @ np.linalg.inv(gram + 1e-3 * len(rows) * np.eye(len(rows)))

    sides = {"x": smoother(x), "y": smoother(F.one_hot(y))}
    for index, z in enumerate(representations):
        R = smoother(z)
        for name, side in sides.items():
            assert seen[f"nhsic_{name}"][index] == pytest.approx(np.trace(R @ side), rel=1e-4)
            chance = np.trace(R) * np.trace(side) / (len(x) - 1)
            assert seen[f"above_chance_{name}"][index] == pytest.approx(np.trace(R @ side) - chance, rel=1e-3, abs=1e-4)
    assert seen["accuracy"] == float((values.argmax(1) == y).double().mean())


def test_activations_are_means_and_counts_by_class():
    one = learner()
    x, y = sample()
    seen = Activations(block=1, units=3, bins=7).look(View(one, x, y))
    one.model.eval()
    z = one.model[1](one.model[0](x)).detach().double().numpy()
    assert seen["block"] == 1
    for label in range(4):
        mine = z[y.numpy() == label]
        assert seen["class_means"][label] == pytest.approx(mine[:, :3].mean(0).tolist())
        counts, _ = np.histogram(mine[:, 0], bins=7, range=(seen["low"], seen["high"]))
        assert seen["counts"][label] == counts.tolist()
    assert (seen["low"], seen["high"]) == (z[:, 0].min(), z[:, 0].max())


@pytest.mark.parametrize("name", ["unet", "dict", "gpt", "residual"])
def test_information_is_seen_in_any_model(name):
    case = MODELS[name]
    one = learner_for(case, lf.rules.get("hsic"))
    ((x, y),) = case.batches(1, samples=12)
    seen = Information(epsilon=1e-3).look(View(one, x, y))
    for side in "xy":
        assert len(seen[f"nhsic_{side}"]) == case.blocks
        assert all(0 <= value <= 12 for value in seen[f"nhsic_{side}"])


@pytest.mark.parametrize("probe", [Information, Activations])
def test_what_a_probe_saw_is_drawn(probe):
    seen = {}
    for rule in ("backprop", "hsic"):
        records = []
        trainer = lf.Trainer(
            learner(rule),
            probes=[probe()],
            probe_data=sample(),
            sinks=[lambda kind, values, to=records: to.append((kind, values))],
        )
        trainer.fit(batches(3), epochs=2)
        seen[rule] = [values for kind, values in records if kind == "probe"]
    figure = probe.draw(seen)
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert {"backprop", "hsic"} <= set(labels)
    if probe is Information:
        first = figure.axes[0].lines[0].get_ydata()
        assert first.tolist() == [record["above_chance_y"][0] for record in seen["backprop"]]


def test_the_command_line_attaches_probes_and_the_report_draws_them(tmp_path, capsys):
    main(
        [
            "compare",
            "--rules",
            "dni,cdni",
            "--data",
            "digits",
            "--epochs",
            "1",
            "--out",
            str(tmp_path / "a"),
            "--probe",
            ",".join(PROBES),
            "--json",
        ]
    )
    page = (tmp_path / "a" / "report.html").read_text()
    for name, probe in PROBES.items():
        assert f"<h2>Probe: {name}</h2>" in page
        assert probe.said in page.replace("&#39;", "'")
    assert len(re.findall(r'<section class="card probe"><svg [^>]*width="100%"', page)) == len(PROBES)
    assert not re.search(r'(src|href)="(?!https://arxiv|#|data:image)', page)  # nothing but itself
    looks = lf.Run.open(tmp_path / "a" / "cdni").metrics("probe")
    assert [line["probe"] for line in looks] == [*PROBES] * 2
    capsys.readouterr()
    plain = tmp_path / "b"
    main(["train", "--rule", "cdni", "--data", "digits", "--epochs", "1", "--out", str(plain), "--json"])
    assert lf.Run.open(plain).result["test_loss"] == lf.Run.open(tmp_path / "a" / "cdni").result["test_loss"]
    assert "Probe:" not in (plain / "report.html").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Information(every=0), "every=0: give a number of steps"),
        (lambda: Activations(units=0), "give 1 or more units"),
        (lambda: Activations(bins=1), "2 or more bins"),
        (lambda: lf.Trainer(learner(), probes=[Information()]), "pass probe_data="),
        (lambda: Activations(block=4).look(View(learner(), *sample())), "block=4: this model has blocks 0 to 3"),
        (lambda: Activations().look(View(learner(), sample()[0], torch.rand(40))), "wants class numbers"),
        (lambda: main(["train", "--probe", "informatio", "--data", "digits"]), None),
    ],
)
def test_bad_input_is_one_clear_line(make, message, capsys):
    if message is None:
        assert make() == 2
        text = capsys.readouterr().err
        assert "unknown probe 'informatio'" in text
        assert "information" in text
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_probe_of_several_tensors_sees_them_all():
    torch.manual_seed(0)
    model = lf.models.side_by_side((1, 4, 4), 3, hidden=(6, 5), count=2)
    one = lf.convert(
        model, lf.rules.HSICBottleneck(sigma=(1.0, 5.0)), loss=nn.functional.cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), example_input=torch.zeros(2, 1, 4, 4),
    )  # fmt: skip
    view = View(one, torch.rand(10, 1, 4, 4), torch.zeros(10, dtype=torch.int64))
    assert [tuple(z.shape) for z in view.representations] == [(10, 12), (10, 10), (10, 3)]


# ---- alignment ---------------------------------------------------------------------------------------------------------------


def flat(gradients):
    return torch.cat([gradient.double().flatten() for gradient in gradients])


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined"])
@pytest.mark.parametrize("rule", ["backprop", "fa", "dfa", "cdni", "hsic", "predsim"])
def test_a_learner_tells_the_gradients_of_a_step_that_it_does_not_take(rule, schedule):
    if schedule == "pipelined" and lf.rules.get(rule).needs(lf.Place(0, 4)) > lf.Needs.TARGET:
        pytest.skip("this rule cannot run without waiting")
    model = CASE.build()
    one = lf.convert(
        model, rule, loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), example_input=batches(1)[0][0],
        schedule=schedule,
    )  # fmt: skip
    for batch in batches(5):
        one.step(*batch)
    before, random = one.state_dict(), torch.get_rng_state()
    told = one.gradients(*sample())
    assert json.dumps(_plain(one.state_dict())) == json.dumps(_plain(before))
    assert torch.equal(torch.get_rng_state(), random)
    one.drain()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if schedule == "lockstep":
        one.step(*sample())
        assert told.keys() == start.keys()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(start[name] - parameter.detach(), told[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rule", ["backprop", "fa", "usf", "dfa"])
def test_alignment_is_the_angle_between_gradients(rule):
    one = learner(rule)
    for batch in batches(3):
        one.step(*batch)
    view = View(one, *sample())
    seen = Alignment().look(view)
    one.model.train()
    told, random = one.gradients(view.inputs, view.targets), torch.get_rng_state()
    loss = F.cross_entropy(one.model(view.inputs), view.targets)
    torch.set_rng_state(random)
    for block, angle in zip(one.chain.blocks, seen["angles"], strict=True):
        names = [name for name, p in one.model.named_parameters() if any(p is other for other in block.parameters())]
        true = torch.autograd.grad(loss, [dict(one.model.named_parameters())[name] for name in names], retain_graph=True)
        mine = flat([told[name] for name in names])
        cosine = float(mine @ flat(true) / mine.norm() / flat(true).norm())
        assert angle == pytest.approx(np.degrees(np.arccos(min(cosine, 1))), abs=0.1)
    assert (max(seen["angles"]) < 0.1) == (rule == "backprop")
    assert len(seen["weights"]) == (4 if rule in ("fa", "usf") else 0)
    if rule == "usf":
        weight = next(one.model.parameters()).detach().double().flatten()
        cosine = float(weight.abs().sum() / weight.norm() / len(weight) ** 0.5)
        assert seen["weights"][0] == pytest.approx(np.degrees(np.arccos(cosine)), abs=0.01)


def test_alignment_is_drawn_in_the_report(tmp_path):
    trainer = lf.Trainer(learner("fa"), run=tmp_path / "a", probes=[Alignment()], probe_data=sample())
    trainer.fit(batches(3), epochs=1)
    lines = lf.Run.open(tmp_path / "a").metrics("probe")
    figure = Alignment.draw({"fa": lines, "none": [{"step": 0, "angles": [None, 3.0], "weights": []}]})
    assert len(figure.axes) == 4
    assert "alignment" in PROBES
