"""The loop around a learner: its numbers are a plain loop's, and an interrupted run ends as an undisturbed one, bit for bit."""

import copy
import json
import math
import os
import signal
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lockfree as lf
from lockfree import checkpoint
from lockfree.data import TensorLoader
from lockfree.sinks import TensorBoard

LR = 0.1


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def network(seed=0, dropout=0.3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def samples(count=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def tensor_loader():
    return TensorLoader(*samples(), batch_size=8, seed=5)


def torch_loader():
    return DataLoader(TensorDataset(*samples()), batch_size=8, shuffle=True)


LOADERS = {"TensorLoader": tensor_loader, "DataLoader": torch_loader}
STEPS = 5  # batches an epoch


def learner_of(rule="backprop", model=None, **settings):
    settings = {"loss": F.cross_entropy, "optimizer": sgd, "example_input": samples()[0][:4]} | settings
    return lf.convert(network() if model is None else model, rule, **settings)


def decay(learner):
    return torch.optim.lr_scheduler.StepLR(learner.optimizer, step_size=1, gamma=0.5)


class Recorder:
    """A sink that remembers, and may press Ctrl-C at a step or an epoch's end."""

    def __init__(self, press_at=None, number=signal.SIGINT):
        self.records, self._press_at, self._number = [], press_at, number

    def __call__(self, kind, values):
        self.records.append((kind, values))
        if (kind, values["step"]) == self._press_at:
            signal.raise_signal(self._number)

    def losses(self):
        return [values["loss"] for kind, values in self.records if kind == "step"]


def assert_same(one, other, path="state"):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}.{index}")
    else:
        assert one == other, path


# ---- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_fit_is_a_plain_loop(make):
    model = network()
    twin, optimizer = copy.deepcopy(model), None
    learner, sink = learner_of("backprop", model), Recorder()
    torch.manual_seed(9)
    summary = lf.Trainer(learner, sinks=[sink]).fit(make(), epochs=3)
    optimizer, losses, loader = sgd(list(twin.parameters())), [], make()
    twin.train()
    torch.manual_seed(9)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(twin(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sink.losses() == losses
    for (name, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert (summary.epochs, summary.steps) == (3, 3 * STEPS)
    assert summary.samples_per_second == pytest.approx(120 / summary.seconds)
    assert summary.peak_activation_bytes > 0
    means = [values["train_loss"] for kind, values in sink.records if kind == "epoch"]
    assert means == pytest.approx([sum(losses[i : i + STEPS]) / STEPS for i in (0, 5, 10)], rel=1e-12)


def test_evaluate_weighs_every_sample_alike():
    learner = learner_of()
    x, y = samples(37)
    uneven = [(x[:10], y[:10]), (x[10:11], y[10:11]), (x[11:], y[11:])]
    state = learner.state_dict()
    found = lf.evaluate(learner, uneven)
    with torch.no_grad():
        scores = copy.deepcopy(learner.model).eval()(x)
    assert found.loss == pytest.approx(F.cross_entropy(scores, y).item(), rel=1e-5)
    assert found.accuracy == (scores.argmax(1) == y).float().mean().item() or found.accuracy == pytest.approx(
        (scores.argmax(1) == y).double().mean().item(), rel=1e-12
    )
    assert_same(learner.state_dict(), state)


def test_evaluate_gives_no_accuracy_where_targets_are_no_classes():
    torch.manual_seed(0)
    x, _ = samples()
    learner = learner_of("backprop", nn.Sequential(nn.Linear(4, 3)), loss=F.mse_loss)
    y = torch.zeros(40, 3)
    found = lf.evaluate(learner, [(x, y)])
    assert found.accuracy is None
    assert found.loss == pytest.approx((learner.predict(x) ** 2).mean().item())


def test_validation_is_logged_after_every_epoch_and_disturbs_nothing():
    ends = []
    for validation in (None, [samples(16, seed=2)]):
        learner, sink = learner_of("cdni"), Recorder()
        torch.manual_seed(9)
        lf.Trainer(learner, sinks=[sink]).fit(tensor_loader(), validation, epochs=2)
        ends.append(learner.state_dict())
    assert_same(*ends)
    last = sink.records[-1][1]
    found = lf.evaluate(learner, validation)
    assert (last["val_loss"], last["val_accuracy"]) == (found.loss, found.accuracy)


def test_fit_puts_the_model_in_training_mode():
    model = network().eval()
    lf.Trainer(learner_of("backprop", model)).fit(tensor_loader(), [samples()], epochs=1)
    assert all(module.training for module in model.modules())


def test_epochs_are_counted_in_all():
    learner = learner_of()
    trainer = lf.Trainer(learner)
    assert trainer.fit(tensor_loader(), epochs=0).steps == 0
    loader = tensor_loader()
    assert trainer.fit(loader, epochs=1).steps == STEPS
    assert trainer.fit(loader, epochs=3).steps == 3 * STEPS
    assert trainer.fit(loader, epochs=3).steps == 3 * STEPS
    with pytest.raises(ValueError, match="epochs=-1: give 0 or more"):
        trainer.fit(loader, epochs=-1)


def test_the_mean_loss_of_an_epoch_leaves_out_the_filling_of_a_pipeline():
    learner, sink = learner_of("cdni", schedule="pipelined"), Recorder()
    torch.manual_seed(9)
    lf.Trainer(learner, sinks=[sink]).fit(tensor_loader(), epochs=2)
    losses = sink.losses()
    assert [math.isnan(loss) for loss in losses] == [True, True, False, False, False] * 2
    assert all(values["train_loss"] > 0 for kind, values in sink.records if kind == "epoch")


# ---- the run folder ----------------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_config_metrics_and_checkpoints(tmp_path):
    sink = Recorder()
    trainer = lf.Trainer(learner_of("dni"), run=tmp_path / "a", sinks=[sink], log_every=2)
    trainer.fit(tensor_loader(), [samples()], epochs=2)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]
    run = lf.Run.open(tmp_path / "a")
    assert run.config["rule"].startswith("SyntheticGradients(")
    steps = run.metrics("step")
    assert [record["step"] for record in steps] == [2, 4, 6, 8, 10]
    assert [record["loss"] for record in steps] == sink.losses()[1::2]
    assert [len(record["auxiliary_loss"]) for record in steps] == [2] * 5
    epochs = run.metrics("epoch")
    assert [(record["epoch"], record["step"]) for record in epochs] == [(1, 5), (2, 10)]
    assert {"train_loss", "val_loss", "val_accuracy", "seconds"} < set(epochs[0])
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["00000005", "00000010"]
    step, state = run.load_checkpoint()
    assert step == 10
    for name, value in trainer.learner.model.state_dict().items():
        assert torch.equal(state["learner"]["model"][name], value)


def test_checkpoints_come_every_so_many_steps(tmp_path):
    seen = []

    def look(kind, values):
        seen.append(sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())[-1])

    lf.Trainer(learner_of(), run=tmp_path / "a", sinks=[look], checkpoint_every=2).fit(tensor_loader(), epochs=1)
    assert seen == [f"{step:08d}" for step in (0, 0, 2, 2, 4, 4)]


def test_no_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lf.Trainer(learner_of()).fit(tensor_loader(), epochs=1)
    assert list(tmp_path.iterdir()) == []


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_with_another_run_is_left_alone(tmp_path):
    lf.Trainer(learner_of(), run=tmp_path / "a").fit(tensor_loader(), epochs=1)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(rule Backprop\(\).*choose another --out") as error:
        lf.Trainer(learner_of("fa"), run=tmp_path / "a")
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="resume=True needs the folder"):
        lf.Trainer(learner_of(), resume=True)
    with pytest.raises(ValueError, match="holds no run"):
        lf.Trainer(learner_of(), run=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: learner_of("fa"), r"another rule: it was saved with Backprop\(\), this learner has FeedbackAlignment\(\)"),
        (lambda: learner_of(blocks=2), "another cut"),
        (lambda: learner_of(links=lf.Link(delay=1)), "another schedule"),
        (
            lambda: learner_of("backprop", nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))),
            r"another cut|another model",
        ),
        (
            lambda: learner_of("backprop", nn.Sequential(*network()[:4], nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 3))),
            r"another model: '4\.bias' is float32 \(8,\) there and float32 \(9,\) here",
        ),
    ],
    ids=["rule", "cut", "links", "depth", "width"],
)
def test_a_checkpoint_of_another_model_or_rule_is_refused(tmp_path, other, message):
    lf.Trainer(learner_of(), run=tmp_path / "a").fit(tensor_loader(), epochs=1)
    before, learner = tree(tmp_path), other()
    weights = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        lf.Trainer(learner, run=tmp_path / "a", resume=True).fit(tensor_loader(), epochs=2)
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before
    assert_same(dict(learner.model.state_dict()), dict(weights))


# ---- stop and go on ----------------------------------------------------------------------------------------------------------


def fit(folder, make, rule="backprop", *, sinks=(), resume=False, epochs=3, seed=9, scheduled=False, **settings):
    """One process's share of a training run; with a resume, everything before the checkpoint is made otherwise."""
    learner = learner_of(rule, network(seed=50 if resume else 0), **settings)
    scheduler = decay(learner) if scheduled else None
    torch.manual_seed(1234 if resume else seed)
    trainer = lf.Trainer(learner, run=folder, resume=resume, sinks=sinks, scheduler=scheduler)
    trainer.fit(make(), [samples(16, seed=2)], epochs=epochs)
    return learner


def metrics(folder):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in lf.Run.open(folder).metrics()]


@pytest.mark.parametrize("stop", [("step", 1), ("step", 7), ("step", 10), ("epoch", 5), ("step", 15), ("epoch", 15)], ids=str)
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduler"])
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_interrupted_fit_goes_on_bit_identically(tmp_path, make, scheduled, stop):
    undisturbed = fit(tmp_path / "a", make, scheduled=scheduled)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", make, scheduled=scheduled, sinks=[Recorder(stop)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert lf.Run.open(tmp_path / "b").load_checkpoint()[0] == stop[1]
    resumed = fit(tmp_path / "b", make, scheduled=scheduled, resume=True)
    assert_same(resumed.state_dict(), undisturbed.state_dict())
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    assert undisturbed.optimizer.param_groups[0]["lr"] == (LR / 8 if scheduled else LR)


@pytest.mark.parametrize("rule", list(lf.rules.RULES))
@pytest.mark.parametrize("settings", [{}, {"links": lf.Link(delay=1)}], ids=["direct", "late"])
def test_an_interrupted_fit_goes_on_under_every_rule(tmp_path, rule, settings):
    if settings and rule == "checkpoint":
        pytest.skip("this rule cannot run with late links")
    undisturbed = fit(tmp_path / "a", tensor_loader, rule, **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", tensor_loader, rule, sinks=[Recorder(("step", 8))], **settings)
    resumed = fit(tmp_path / "b", tensor_loader, rule, resume=True, **settings)
    assert_same(resumed.state_dict(), undisturbed.state_dict())


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_a_pipeline_in_flight_is_resumed_too(tmp_path, make):
    undisturbed = fit(tmp_path / "a", make, "cdni", schedule="pipelined")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", make, "cdni", sinks=[Recorder(("step", 7))], schedule="pipelined")
    _, state = lf.Run.open(tmp_path / "b").load_checkpoint()
    assert len(state["learner"]["flights"]) > 0
    resumed = fit(tmp_path / "b", make, "cdni", resume=True, schedule="pipelined")
    assert_same(resumed.state_dict(), undisturbed.state_dict())


def test_a_run_interrupted_twice_is_still_the_same(tmp_path):
    undisturbed = fit(tmp_path / "a", torch_loader)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", torch_loader, sinks=[Recorder(("step", 3))])
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", torch_loader, resume=True, sinks=[Recorder(("step", 4))])
    assert_same(fit(tmp_path / "b", torch_loader, resume=True).state_dict(), undisturbed.state_dict())
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM handlers")
def test_sigterm_is_taken_for_ctrl_c(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", tensor_loader, sinks=[Recorder(("step", 2), signal.SIGTERM)])
    assert lf.Run.open(tmp_path / "a").load_checkpoint()[0] == 2


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_a_finished_run_goes_on_for_more_epochs(tmp_path, make):
    undisturbed = fit(tmp_path / "a", make, epochs=3)
    fit(tmp_path / "b", make, epochs=2)
    resumed = fit(tmp_path / "b", make, epochs=3, resume=True)
    assert_same(resumed.state_dict(), undisturbed.state_dict())


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    learner = fit(tmp_path / "a", tensor_loader, epochs=2)
    before = metrics(tmp_path / "a")
    again = fit(tmp_path / "a", tensor_loader, epochs=2, resume=True)
    assert_same(again.state_dict(), learner.state_dict())
    assert metrics(tmp_path / "a") == before


@pytest.mark.parametrize("damage", ["truncated tensors", "truncated tree", "no tree", "flipped bit", "killed before renaming"])
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_a_half_written_checkpoint_is_passed_over(tmp_path, make, damage):
    undisturbed = fit(tmp_path / "a", make)

    def every_three(folder, resume, sinks=()):
        learner = learner_of("backprop", network(seed=50 if resume else 0))
        torch.manual_seed(1234 if resume else 9)
        trainer = lf.Trainer(learner, run=folder, resume=resume, sinks=sinks, checkpoint_every=3)
        trainer.fit(make(), [samples(16, seed=2)], epochs=3)
        return learner

    with pytest.raises(KeyboardInterrupt):
        every_three(tmp_path / "b", False, [Recorder(("step", 8))])
    folder = tmp_path / "b" / "checkpoints"
    newest = folder / "00000008"
    assert sorted(path.name for path in folder.iterdir()) == ["00000006", "00000008"]
    if damage == "truncated tensors":
        os.truncate(newest / "state.safetensors", 1000)
    elif damage == "truncated tree":
        os.truncate(newest / "state.json", 1000)
    elif damage == "no tree":
        (newest / "state.json").unlink()
    elif damage == "flipped bit":
        content = bytearray((newest / "state.safetensors").read_bytes())
        content[-5] ^= 1
        (newest / "state.safetensors").write_bytes(content)
    else:
        newest.rename(folder / ".00000008.new")
    assert lf.Run.open(tmp_path / "b").load_checkpoint()[0] == 6
    resumed = every_three(tmp_path / "b", True)
    assert_same(resumed.state_dict(), undisturbed.state_dict())
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


def test_only_corrupt_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    fit(tmp_path / "a", tensor_loader, epochs=1)
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        os.truncate(path / "state.safetensors", 10)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="all checkpoints are corrupt"):
        fit(tmp_path / "a", tensor_loader, epochs=2, resume=True)


def test_a_resume_with_a_shorter_loader_says_so(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", torch_loader, sinks=[Recorder(("step", 4))])

    def short():
        return DataLoader(TensorDataset(*samples(16)), batch_size=8, shuffle=True)

    with pytest.raises(ValueError, match="has 2 batches an epoch, but the run was stopped after 4"):
        fit(tmp_path / "a", short, resume=True)


# ---- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [[], iter(())], ids=["list", "iterator"])
def test_an_empty_training_loader(loader):
    with pytest.raises(ValueError, match=r"^the training loader gave no batch: check that the data set is not empty") as error:
        lf.Trainer(learner_of()).fit(loader, epochs=1)
    assert "\n" not in str(error.value)


def test_an_iterator_that_is_used_up_after_one_epoch():
    batches = iter([samples()])
    with pytest.raises(ValueError, match="the training loader gave no batch"):
        lf.Trainer(learner_of()).fit(batches, epochs=2)


def test_an_empty_evaluation_loader():
    with pytest.raises(ValueError, match=r"^the evaluation loader gave no batch: pass a set with at least one sample"):
        lf.evaluate(learner_of(), [])


def test_the_last_batch_of_one_sample():
    with pytest.raises(ValueError, match=r"one sample cannot be normalised by BatchNorm \('1'\).*drop_last=True"):
        lf.Trainer(learner_of()).fit(TensorLoader(*samples(17), batch_size=8), epochs=1)
    assert lf.Trainer(learner_of()).fit(TensorLoader(*samples(17), batch_size=8, drop_last=True), epochs=1).steps == 2


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    x, y = samples()
    spoilt = x.clone()
    spoilt[26] = math.nan

    def run(inputs, resume):
        learner = learner_of()
        torch.manual_seed(9)
        loader = TensorLoader(inputs, y, batch_size=8, shuffle=False)
        lf.Trainer(learner, run=tmp_path / "a", resume=resume, checkpoint_every=2).fit(loader, epochs=1)
        return learner

    with pytest.raises(lf.Diverged, match=r"the loss is nan at step 4: cell 0 \('0'\)"):
        run(spoilt, False)
    step, state = lf.Run.open(tmp_path / "a").load_checkpoint()
    assert step == 2
    assert all(value.isfinite().all() for value in state["learner"]["model"].values())
    resumed = run(x, True)  # with the data mended, training goes on from there
    learner = learner_of()
    torch.manual_seed(9)
    lf.Trainer(learner).fit(TensorLoader(x, y, batch_size=8, shuffle=False), epochs=1)
    assert_same(resumed.state_dict(), learner.state_dict())


def test_a_sinks_own_error_is_not_swallowed(tmp_path):
    def broken(kind, values):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        lf.Trainer(learner_of(), run=tmp_path / "a", sinks=[broken]).fit(tensor_loader(), epochs=1)


@pytest.mark.parametrize("settings", [{"log_every": 0}, {"checkpoint_every": -1}, {"checkpoint_every": 0}])
def test_intervals_are_one_or_more(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        lf.Trainer(learner_of(), **settings).fit(tensor_loader(), epochs=1)


# ---- TensorBoard -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_scalars(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recorder = Recorder()
    sinks = [TensorBoard(tmp_path), recorder]
    lf.Trainer(learner_of(), sinks=sinks).fit(tensor_loader(), [samples()], epochs=2)
    found = accumulators.EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {
        *("step/loss", "epoch/train_loss", "epoch/val_loss", "epoch/val_accuracy", "epoch/seconds")
    }
    assert [event.step for event in found.Scalars("step/loss")] == list(range(1, 11))
    assert [event.value for event in found.Scalars("step/loss")] == pytest.approx(recorder.losses(), rel=1e-6)
    assert [event.step for event in found.Scalars("epoch/train_loss")] == [5, 10]
    last = recorder.records[-1][1]
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert found.Scalars(f"epoch/{name}")[-1].value == pytest.approx(last[name], rel=1e-6)


def test_a_missing_tensorboard_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'^the TensorBoard sink needs tensorboard: pip install "lockfree\[tensorboard\]"$'):
        TensorBoard(tmp_path / "board")
    assert not (tmp_path / "board").exists()


def test_metrics_are_strict_json(tmp_path):
    fit(tmp_path / "a", tensor_loader, "cdni", schedule="pipelined", epochs=1)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["kind"] in ("step", "epoch")
