"""Training on recurrent tasks: stops that can be gone on from, what is written and measured, the command line, trials, the benchmark."""

import json
import math
import re
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lockfree as lf
from lockfree import cli
from lockfree.bench.recurrent import Size, recurrent, saved
from lockfree.fields import build, parse_fields, written_fields
from lockfree.memory import ActivationMeter
from lockfree.objective import Diverged
from lockfree.recipes.recurrent_trial import RecurrentTrial
from lockfree.recipes.trial import Point
from lockfree.recurrent import BOOTSTRAPS, LeastSquaresGradient, SyntheticGradient, TaskTrainer
from lockfree.recurrent.experiment import CORES, TaskExperiment
from lockfree.recurrent.tasks import TASKS, CharacterModel, Copy, SequentialImages

TEXT = {"text": "shakespeare-sample", "length": 7, "evaluated": 60, "rows": 4}
SMALL = {"units": 6, "batch": 4, "epochs": 2, "stretches": 5, "learning_rate": 0.01}
KINDS = {  # settings of an experiment: a curriculum that moves on at once, a stream whose state is carried, images, ...
    "copy": {"task": "copy", "horizon": 2, "bootstrap": "dni", "task_fields": {"threshold": 2.0, "window": 2}},
    "text": {"task": "char-lm", "horizon": 3, "bootstrap": "dni", "auxiliary": True, "embedding": 3, "task_fields": TEXT},
    "solved": {"task": "char-lm", "core": "gru", "horizon": 2, "bootstrap": "dni-solved", "task_fields": TEXT},
    "images": {"task": "sequential-images", "core": "rnn", "horizon": 3, "task_fields": {"data": "digits", "by": "row"}},
}
TIMES = ("seconds", "samples_per_second")


@pytest.fixture(autouse=True)
def _no_data_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path_factory.mktemp("data")))
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def call(capsys):
    """Runs a command in this process; returns exit code, standard output, standard error."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def experiment(kind, **more):
    return TaskExperiment(**SMALL | KINDS[kind] | more)


def trainer_of(kind, folder, **options):
    """A trainer of fresh objects, as a new process would make it, and its experiment."""
    what = experiment(kind)
    task = what.make_task()
    learner = what.make_learner(task)
    scheduler = torch.optim.lr_scheduler.StepLR(learner.optimizer, 1, gamma=0.5)
    return TaskTrainer(learner, task, run=folder, scheduler=scheduler, **options), what


def untimed(record):
    return {name: value for name, value in record.items() if name not in TIMES}


def flat(state, path=""):
    if isinstance(state, dict):
        return {name: leaf for key, value in state.items() for name, leaf in flat(value, f"{path}.{key}").items()}
    if isinstance(state, list | tuple):
        return {name: leaf for key, value in enumerate(state) for name, leaf in flat(value, f"{path}.{key}").items()}
    return {path: state}


def assert_same_end(one, other):
    """The newest checkpoints of two runs, bit for bit, and what was measured; but for the times."""
    states = [flat(lf.Run.open(folder).load_checkpoint()[1]) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, mine in states[0].items():
        theirs = states[1][name]
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs), name
        elif name != ".progress.seconds":
            assert mine == theirs or (mine != mine and theirs != theirs), name
    metrics = [[untimed(line) for line in lf.Run.open(folder).metrics()] for folder in (one, other)]
    assert metrics[0] == metrics[1]


# ---- going on ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 3, 5, 8], ids="stretch {}".format)
def test_ctrl_c_finishes_the_stretch_and_resume_ends_as_if_undisturbed(kind, stop, tmp_path):
    undisturbed, what = trainer_of(kind, tmp_path / "a")
    undisturbed.fit(what.epochs, what.stretches)

    def press(of, values):
        if of == "step" and values["step"] == stop:
            signal.raise_signal(signal.SIGINT)

    trainer, _ = trainer_of(kind, tmp_path / "b", sinks=[press])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(what.epochs, what.stretches)
    assert lf.Run.open(tmp_path / "b").load_checkpoint()[0] == stop
    torch.manual_seed(999)  # a resume brings the generators with it
    resumed, _ = trainer_of(kind, tmp_path / "b", resume=True)
    summary = resumed.fit(what.epochs, what.stretches)
    assert (summary.epochs, summary.steps) == (2, 10)
    assert resumed.figures() == undisturbed.figures()
    assert resumed.task.state_dict() == undisturbed.task.state_dict()
    assert_same_end(tmp_path / "a", tmp_path / "b")


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["copy", "text"])
def test_a_killed_run_goes_on_from_its_last_checkpoint_within_an_epoch(kind, tmp_path):
    undisturbed, what = trainer_of(kind, tmp_path / "a", checkpoint_every=2)
    undisturbed.fit(what.epochs, what.stretches)

    def kill(of, values):
        if of == "step" and values["step"] == 9:
            raise Killed

    with pytest.raises(Killed):
        trainer_of(kind, tmp_path / "b", checkpoint_every=2, sinks=[kill])[0].fit(what.epochs, what.stretches)
    assert lf.Run.open(tmp_path / "b").load_checkpoint()[0] == 8
    resumed, _ = trainer_of(kind, tmp_path / "b", checkpoint_every=2, resume=True)
    resumed.fit(what.epochs, what.stretches)
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_more_epochs_follow_as_if_they_had_been_asked_for_at_once(tmp_path):
    trainer_of("copy", tmp_path / "a")[0].fit(3, 4)
    trainer_of("copy", tmp_path / "b")[0].fit(1, 4)
    trainer_of("copy", tmp_path / "b", resume=True)[0].fit(3, 4)
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_a_run_stopped_in_an_epoch_is_judged_with_the_weights_it_was_stopped_at(tmp_path):
    def press(kind, values):
        if kind == "step" and values["step"] == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer_of("text", tmp_path / "a", sinks=[press])[0].fit(2, 5)
    again, _ = trainer_of("text", tmp_path / "a", resume=True)
    assert again.fit(1, 5).steps == 7  # it has done one epoch and more
    assert again.figures() == again.task.evaluate(again.learner)
    assert again.figures()["bits_per_character"] != again.run.metrics("epoch")[-1]["bits_per_character"]


def test_a_state_of_another_task_is_refused(tmp_path):
    trainer_of("copy", tmp_path / "a")[0].fit(1, 2)
    what = experiment("copy", horizon=3)
    with pytest.raises(ValueError, match="the state is of another horizon"):
        TaskTrainer(what.make_learner(what.make_task()), what.make_task(), run=tmp_path / "a", resume=True).fit(1, 2)


# ---- what it does ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_equal_settings_give_equal_numbers_and_another_seed_does_not(kind):
    found = [untimed(experiment(kind, seed=seed).run()) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0]["test_loss"] != found[2]["test_loss"]


@pytest.mark.parametrize("kind", ["copy", "text"])
def test_it_is_the_loop_that_one_would_write(kind, tmp_path):
    trainer, what = trainer_of(kind, tmp_path / "a")
    trainer.fit(what.epochs, what.stretches)
    task = what.make_task()
    learner = what.make_learner(task)
    rate, told = what.learning_rate, []
    for epoch in range(2):
        learner.optimizer.param_groups[0]["lr"] = rate * 0.5**epoch
        bits, synthetic = [], []
        for number in range(5 * epoch, 5 * epoch + 5):
            stretch = task.stretch(number)
            learnt = learner.step(*stretch)
            bits.append(task.bits(learnt.loss, stretch.targets))
            task.learnt(bits[-1])
            synthetic += [] if learnt.synthetic is None else [learnt.synthetic]
        told.append((math.fsum(bits) / 5, math.fsum(synthetic) / len(synthetic), task.evaluate(learner)))
    assert task.state_dict() == trainer.task.state_dict()
    for mine, theirs in zip(trainer.learner.core.parameters(), learner.core.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    lines = trainer.run.metrics("epoch")
    for line, (bits, synthetic, figures), epoch in zip(lines, told, (1, 2), strict=True):
        assert (line["epoch"], line["step"]) == (epoch, 5 * epoch)
        assert line["train_loss"] == pytest.approx(bits, rel=1e-12)
        assert line["synthetic_loss"] == pytest.approx(synthetic, rel=1e-12)
        assert {name: line[name] for name in figures} == figures
        assert (line["auxiliary_loss"] is None) == (kind == "copy")
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"]


def test_a_curriculum_is_told_and_moves_on():
    result = experiment("copy", task_fields={"threshold": 5.0, "window": 2}).run()  # nothing is as bad as 5 bits
    assert result["length_solved"] == 5.0
    assert (result["measure"], result["data"], result["stretches"]) == ("length solved", "copy", 10)


def test_what_a_result_has():
    text, images = experiment("text").run(), experiment("images").run()
    fixed = {
        "rule",
        "data",
        "seed",
        "epochs",
        "test_loss",
        *TIMES,
        "peak_activation_bytes",
        "locks",
        "task",
        "horizon",
        "bootstrap",
    }
    assert set(text) >= fixed | {"bits_per_character", "test_bits_per_character", "parameters"}
    assert set(images) >= fixed | {"accuracy", "test_accuracy"}
    assert (text["rule"], text["data"], images["data"]) == ("dni", "shakespeare-sample", "digits")
    assert text["test_loss"] == text["test_bits_per_character"]
    assert images["test_accuracy"] == images["accuracy"]
    assert text["samples_per_second"] == pytest.approx(10 * 7 * 4 / text["seconds"])
    symbols = len(CharacterModel(**TEXT).corpus.vocabulary)
    assert text["parameters"] == 3 * symbols + 4 * 6 * (3 + 6 + 2) + symbols * (6 + 1)


@pytest.mark.parametrize(
    ("bootstrap", "locks"),
    [("none", ["forward"]), ("dni", ["forward"]), ("oracle", ["forward", "update", "backward"])],
)
def test_locks_between_chunks_follow_from_what_the_bootstrap_needs(bootstrap, locks):
    assert experiment("images", bootstrap=bootstrap, epochs=0).run()["locks"] == locks


ALTERNATING = {"bootstrap": "alternating", "auxiliary": False, "decay": "restarts", "restart": 6, "epochs": 3}


def test_alternation_changes_sides_where_the_rate_restarts(monkeypatch):
    what, seen, learners = experiment("text", **ALTERNATING), [], []
    make = TaskExperiment.make_learner
    monkeypatch.setattr(TaskExperiment, "make_learner", lambda self, task: learners.append(make(self, task)) or learners[-1])

    def spy(kind, values):
        if kind == "step":
            (learner,) = learners
            synthetic = learner.bootstrap.synthetic(learner.updates)
            seen.append((learner.updates, synthetic, learner.optimizer.param_groups[0]["lr"]))

    what.run(sinks=[spy])
    assert [updates for updates, _, _ in seen] == [3 * stretch for stretch in range(1, 16)]  # 7 steps are 3 chunks
    starts = {0: 6, 6: 12, 12: 24, 24: 48}  # the first cycle is 6 chunks long, the next one ends after 12, ...
    for updates, synthetic, rate in seen:
        start = max(start for start in starts if start <= updates)
        part = (updates - start) / (starts[start] - start)
        assert rate == pytest.approx(what.learning_rate * 0.5 * (1 + math.cos(math.pi * part)))
        assert synthetic == (start in (6, 24))


def test_alternation_goes_on_where_it_was_stopped(tmp_path):
    whole = experiment("text", **ALTERNATING).run(tmp_path / "a")
    stopped = experiment("text", **ALTERNATING | {"epochs": 2}).run(tmp_path / "b")
    assert stopped["epochs"] == 2
    assert untimed(experiment("text", **ALTERNATING).run(tmp_path / "b", resume=True)) == untimed(whole)


def test_cycles_of_the_bootstrap_s_own_hold():
    fields = {"restarts": {"growth": 3}, "begins": "synthetic"}
    bootstrap = experiment("text", **ALTERNATING, bootstrap_fields=fields).make_bootstrap()
    assert isinstance(bootstrap, lf.recurrent.Alternating)
    assert (bootstrap.restarts, bootstrap.begins) == (lf.recurrent.WarmRestarts(first=6, growth=3), "synthetic")


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_and_core_learns(task, core):
    fields = {
        "char-lm": TEXT,
        "word-lm": TEXT | {"vocabulary_size": 50},
        "sequential-images": {"data": "digits", "by": "row", "evaluated": 20},
        "counting": {"data": "digits", "period": 2, "evaluated": 8},
    }
    settings = SMALL | {"epochs": 1, "stretches": 2, "layers": 2}
    result = TaskExperiment(
        task=task, core=core, bootstrap="dni", horizon=2, task_fields=fields.get(task, {}), **settings
    ).run()
    assert math.isfinite(result["test_loss"])
    assert result["peak_activation_bytes"] > 0


def test_no_epochs_only_evaluate():
    result = experiment("text", epochs=0).run()
    assert (result["epochs"], result["stretches"], result["peak_activation_bytes"]) == (0, 0, None)
    assert 0 < result["test_loss"] < 2 * math.log2(63)


def test_the_peak_is_that_of_chunks_of_the_horizon_however_long_a_curriculum_becomes():
    """With 16 stretches sequences grow from 3 to 33 steps; what is kept grows until there are two chunks of 4, and no further."""
    settings = {"bootstrap": "none", "horizon": 4, "epochs": 1, "task_fields": {"threshold": 9.0, "window": 1}}
    short, long = (experiment("copy", stretches=count, **settings).run()["peak_activation_bytes"] for count in (5, 17))
    first = experiment("copy", stretches=1, **settings).run()["peak_activation_bytes"]
    assert first is None  # the second stretch is the first that is watched
    assert short == long
    task = Copy(batch=4, window=1, threshold=9.0)
    learner = experiment("copy", **settings).make_learner(task)
    task.learnt(0.0), task.learnt(0.0), task.learnt(0.0)
    stretch = task.stretch(0)  # 9 steps: chunks of 4, 4 and 1
    learner.step(*stretch)
    meter = ActivationMeter(learner.core, learner.readout)
    with meter.watch(stretch):
        learner.step(*stretch)
    assert long == meter.peak


@dataclass(frozen=True, kw_only=True)
class Wide(SequentialImages):
    """Rows of images side by side, so many times."""

    times: int = 1

    @property
    def features(self):
        return super().features * self.times

    def stretch(self, number):
        stretch = super().stretch(number)
        return stretch._replace(inputs=stretch.inputs.repeat(1, 1, self.times))

    def evaluate(self, learner):
        return {"accuracy": 0.0}


class Linear(nn.Module):
    """A core whose first operation keeps its input for the backward pass, as it is."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 4)

    def forward(self, inputs, state=None):
        outputs = []
        for step in inputs:
            made = self.layer(step)
            state = (made if state is None else made + state).tanh()
            outputs.append(state)
        return torch.stack(outputs), state

    def initial_state(self, samples):
        return torch.zeros(samples, 4)


def test_the_inputs_of_a_stretch_are_no_activations():
    peaks = []
    for times in (1, 3):
        task = Wide(data="digits", by="row", batch=4, times=times)
        learner = lf.recurrent.convert(
            Linear(task.features),
            nn.Linear(4, 10),
            horizon=4,
            loss=task.loss,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        peaks.append(TaskTrainer(learner, task).fit(1, 3).peak_activation_bytes)
    assert peaks[0] == peaks[1] > 0


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    wild = experiment("text", optimizer="sgd", learning_rate=1e38, bootstrap="none", auxiliary=False)
    with pytest.raises(Diverged, match="lower the learning rate"):
        wild.run(tmp_path / "a")
    step, state = lf.Run.open(tmp_path / "a").load_checkpoint()
    assert step == 0
    assert all(value.isfinite().all() for value in state["learner"]["core"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every=0: give a number of stretches, 1 or more"),
        ({"resume": True}, "resume=True needs the folder of the run"),
    ],
)
def test_a_trainer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of("copy", None, **options)


@pytest.mark.parametrize(("epochs", "stretches"), [(-1, 1), (1, 0)])
def test_a_fit_needs_epochs_and_stretches(epochs, stretches):
    with pytest.raises(ValueError, match=r"give [01] or more"):
        trainer_of("copy", None)[0].fit(epochs, stretches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_gpu_goes_on_where_it_was_stopped(kind, tmp_path):
    what = experiment(kind, device="cuda")
    result = what.run(tmp_path / "a")
    experiment(kind, device="cuda", epochs=1, decay="constant").run(tmp_path / "b")
    experiment(kind, device="cuda", decay="constant").run(tmp_path / "b", resume=True)
    assert result["epochs"] == lf.Run.open(tmp_path / "b").result["epochs"] == 2
    assert result["peak_activation_bytes"] > 0
    on_cpu = experiment(kind).run()
    assert result["test_loss"] == pytest.approx(on_cpu["test_loss"], rel=0.05)


# ---- settings ----------------------------------------------------------------------------------------------------------------


def test_settings_survive_json():
    what = experiment("text", clip_norm=1.5, bootstrap_fields={"hidden_layers": 2, "scale": 0.1})
    again = TaskExperiment.from_config(json.loads(json.dumps(what.config() | {"lockfree": "0", "started": "now"})))
    assert again == what
    assert again.make_bootstrap() == SyntheticGradient(hidden_layers=2, scale=0.1)
    assert again.make_task().length == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "copie"}, "unknown task 'copie': did you mean 'copy'"),
        ({"core": "lstmm"}, "unknown core 'lstmm': did you mean 'lstm'"),
        ({"bootstrap": "dnj"}, "unknown bootstrap 'dnj': did you mean 'dni'"),
        ({"horizon": 0}, "horizon=0: give 1 or more"),
        ({"embedding": -1}, "embedding=-1: give 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: give a number above 0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0: give a number above 0"),
        ({"task_fields": {"batch": 3}}, "task_fields has batch: give it as the setting of the same name"),
        ({"task_fields": {"lenght": 3}}, "unknown field of CharacterModel 'lenght': did you mean 'length'"),
        ({"bootstrap": "none", "auxiliary": True}, "auxiliary=True foretells synthetic gradients, of which there are none"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        experiment("text", **settings)


def test_features_are_not_embedded():
    with pytest.raises(ValueError, match="embedding=3: sequential-images shows features, not symbols"):
        experiment("images", embedding=3).run()


def test_fields_are_read_by_their_types_and_written_back():
    given = ["bootstrap.scale=0.5", "bootstrap.gamma=none", "bootstrap.every=3"]
    fields = parse_fields(LeastSquaresGradient, given, prefix="bootstrap", of="it")
    assert fields == {"scale": 0.5, "gamma": None, "every": 3}
    assert parse_fields(LeastSquaresGradient, written_fields("bootstrap", fields), prefix="bootstrap", of="it") == fields
    assert build(LeastSquaresGradient, fields) == LeastSquaresGradient(scale=0.5, every=3)


@dataclass(frozen=True, kw_only=True)
class Inner:
    first: int = 5
    words: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    beside: float = 0.0


def test_fields_of_fields_are_written_with_dots():
    given = ("it.inner.first=7", "it.inner.words=1,2", "it.beside=0.5")
    fields = parse_fields(Outer, given, prefix="it", of="it")
    assert fields == {"inner": {"first": 7, "words": (1, 2)}, "beside": 0.5}
    assert written_fields("it", fields) == given
    assert build(Outer, json.loads(json.dumps(fields))) == Outer(inner=Inner(first=7, words=(1, 2)), beside=0.5)
    with pytest.raises(ValueError, match="unknown field of it 'frist': did you mean 'first'"):
        parse_fields(Outer, ["it.inner.frist=7"], prefix="it", of="it")


# ---- the command line --------------------------------------------------------------------------------------------------------

TRAIN = ("train", "--task", "copy", "--units", "6", "--batch", "4", "--horizon", "2", "--epochs", "2", "--stretches", "3")
LM = (*TRAIN[:1], "--task", "char-lm", *TRAIN[3:], "--set", *(f"task.{name}={value}" for name, value in TEXT.items()))


def test_train_json_ends_with_one_object(call, tmp_path):
    code, out, err = call(*LM, "bootstrap.scale=0.1", "--bootstrap", "dni", "--auxiliary", "--json", "--out", tmp_path / "a")
    assert code == 0
    (line,) = out.splitlines()
    result = json.loads(line)
    assert (result["rule"], result["task"], result["data"], result["epochs"]) == ("dni", "char-lm", "shakespeare-sample", 2)
    assert [text.partition(", loss ")[0] for text in err.splitlines()] == ["training: epoch 1/2", "training: epoch 2/2"]
    config = lf.Run.open(tmp_path / "a").config
    assert config["bootstrap_fields"] == {"scale": 0.1}
    assert config["task_fields"] == TEXT


def test_train_prints_plain_lines_when_piped_and_writes_a_report(call, tmp_path):
    code, out, err = call(*TRAIN, "--bootstrap", "dni", "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    first, _, header, row, last = out.splitlines()
    assert first.startswith("training: epoch 1/2, loss ")
    assert first.endswith(" bits, length solved 0")
    assert header.split() == ["bootstrap", "length", "solved", "seconds", "samples/s", "peak", "activations", "locks", "kept"]
    assert row.split()[:2] == ["dni", "0"]
    assert row.split()[-1] == "forward"
    assert last == f"report: {tmp_path / 'a' / 'report.html'}"
    page = (tmp_path / "a" / "report.html").read_text()
    assert "dni on copy" in page
    for chart in ("Training loss", "Length solved", "Loss of the synthetic gradient"):
        assert f"<h3>{chart} " in page
    assert "Loss of the auxiliary task" not in page
    assert "test accuracy" not in page


def test_an_accuracy_is_drawn_in_per_cent(call, tmp_path):
    settings = ("--task", "sequential-images", "--set", "task.data=digits", "task.by=row", "--units", "4", "--stretches", "2")
    assert call("train", *settings, "--epochs", "1", "--out", tmp_path / "a")[0] == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<h3>Validation accuracy " in page
    assert "test accuracy" in page


def test_resume_needs_no_other_settings(call, tmp_path):
    settings = (*LM, "bootstrap.hidden_layers=0", "--bootstrap", "dni", "--decay", "constant")
    assert call(*settings, "--out", tmp_path / "a")[0] == 0
    assert call("train", "--resume", "--out", tmp_path / "a", "--epochs", "3")[0] == 0
    assert call(*settings, "--epochs", "3", "--out", tmp_path / "b")[0] == 0
    assert_same_end(tmp_path / "a", tmp_path / "b")
    results = [untimed(lf.Run.open(tmp_path / name).result) for name in "ab"]
    assert results[0] == results[1]
    assert call(*settings, "--resume", "--out", tmp_path / "a")[0] == 0  # and with the same ones


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(call, tmp_path, monkeypatch):
    step = lf.recurrent.RecurrentLearner.step

    def press(self, *stretch):
        signal.raise_signal(signal.SIGINT)
        return step(self, *stretch)

    monkeypatch.setattr(lf.recurrent.RecurrentLearner, "step", press)
    code, out, err = call(*TRAIN, "--out", tmp_path / "a")
    assert (code, out) == (130, "")
    assert err.splitlines() == ["interrupted; a checkpoint was written, go on with the same command and --resume"]
    assert lf.Run.open(tmp_path / "a").load_checkpoint()[0] == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert call(*TRAIN, "--out", tmp_path / "a", "--resume")[0] == 0
    assert call(*TRAIN, "--out", tmp_path / "b")[0] == 0
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_help_of_a_task_is_its_own(call):
    code, out, _ = call("train", "--task", "copy", "--help")
    assert code == 0
    assert "--horizon" in out
    assert "--rule" not in out
    assert "--task TASK --help" in " ".join(call("train", "--help")[1].split())


WRONG = {
    "unknown task": (["--task", "copie"], "unknown task 'copie': did you mean 'copy'"),
    "no task": (["--task"], "--task"),
    "unknown core": (["--task", "copy", "--core", "gro"], "unknown core 'gro': did you mean 'gru'"),
    "horizon": (["--task", "copy", "--horizon", "0"], "horizon=0: give 1 or more"),
    "rule": (["--task", "copy", "--rule", "dni"], "--rule means nothing with --task: give --bootstrap"),
    "model": (["--task=copy", "--model=mlp"], "--model means nothing with --task: give --core"),
    "stash": (["--task", "copy", "--no-stash"], "--stash means nothing with --task"),
    "no such field of none": (
        ["--task", "copy", "--set", "bootstrap.nothing=1"],
        "unknown field of bootstrap 'none' 'nothing'",
    ),
    "no such field": (
        ["--task", "copy", "--bootstrap", "dni", "--set", "bootstrap.scales=1"],
        "unknown field of bootstrap 'dni' 'scales': did you mean 'scale'",
    ),
    "no field of its own": (
        ["--task", "copy", "--bootstrap", "dni", "--set", "bootstrap.scale.x=1"],
        "scale has no fields of its own",
    ),
    "another prefix": (["--task", "copy", "--set", "rule.scale=1"], "write bootstrap.FIELD=VALUE or task.FIELD=VALUE"),
    "no value": (["--task", "copy", "--set", "task.alphabet"], "write task.FIELD=VALUE"),
    "batch as a field": (["--task", "copy", "--set", "task.batch=3"], "unknown field of task 'copy' 'batch'"),
    "not made by hand": (["--task", "copy", "--set", "task.curriculum=3"], "unknown field of task 'copy' 'curriculum'"),
    "another type": (["--task", "copy", "--set", "task.alphabet=two"], "alphabet is int, not 'two'"),
    "another word": (["--task", "sequential-images", "--set", "task.by=column"], "by is pixel or row, not 'column'"),
    "out of range": (["--task", "copy", "--set", "task.threshold=0"], "threshold must be above 0 bits"),
    "unknown text": (["--task", "char-lm", "--set", "task.text=nowhere"], "unknown text set 'nowhere'"),
    "unknown flag": (["--task", "copy", "--horizen", "3"], r"--horizen.*\(see lockfree train --task TASK --help\)"),
    "horizon without a task": (["--horizon", "3"], r"--horizon.*\(see lockfree train --help\)"),
    "resume without out": (["--task", "copy", "--resume"], "--resume needs the folder of the run: give --out"),
    "resume of nothing": (["--resume", "--task", "copy", "--out", "nowhere"], "nowhere holds no run"),
}


def complaint(result):
    code, out, err = result
    assert (code, out) == (2, ""), result
    (line,) = err.splitlines()
    assert line.startswith("lockfree train: ")
    return line


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_one_line_and_exit_code_2(call, case):
    arguments, message = WRONG[case]
    line = complaint(call("train", *arguments))
    assert re.search(message, line), line


def test_an_empty_text_is_one_line_and_leaves_no_folder(call, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (folder / "tinyshakespeare.txt").write_text("")
    monkeypatch.setenv("LOCKFREE_DATA", str(tmp_path / "data"))
    complaint(call("train", "--task", "char-lm", "--out", tmp_path / "a"))
    complaint(
        call(
            "train", "--task", "char-lm", "--set", "task.text=shakespeare-sample", "task.length=999999", "--out", tmp_path / "a"
        )
    )
    assert not (tmp_path / "a").exists()


def test_a_folder_that_holds_another_run_is_left_as_it_is(call, tmp_path):
    assert call(*TRAIN, "--out", tmp_path / "a")[0] == 0
    assert "holds another run (task copy, seed 0" in complaint(call(*TRAIN, "--out", tmp_path / "a"))
    assert "was started with seed=0, not 5" in complaint(call("train", "--resume", "--seed", 5, "--out", tmp_path / "a"))
    assert "--rule means nothing with --task" in complaint(call("train", "--resume", "--rule", "fa", "--out", tmp_path / "a"))
    assert call("train", "--data", "digits", "--epochs", "0", "--out", tmp_path / "b")[0] == 0
    assert "holds a run that is not of a task" in complaint(
        call("train", "--resume", "--task", "copy", "--out", tmp_path / "b")
    )
    code, _, err = call("replay", tmp_path / "a")
    assert code == 2
    assert "holds no trace" in err


# ---- trials and the benchmark ------------------------------------------------------------------------------------------------


def trial(measure="bits_per_character", x=3, **more):
    settings = {name: value for name, value in SMALL.items() if name != "seed"} | KINDS["text"] | more
    return RecurrentTrial(panel="p", series="DNI", x=x, seed=4, data="char-lm", settings=settings, measure=measure)


def test_a_trial_gives_what_its_experiment_gives(tmp_path):
    result = trial().run(tmp_path / "a")
    expected = experiment("text", seed=4).run()
    assert {name: result[name] for name in untimed(expected)} == untimed(expected)
    assert trial().reading(result, Point("p", 3)) == expected["bits_per_character"] == result["curve"][-1]
    assert (result["diverged"], len(result["curve"])) == (None, 2)
    assert trial().run(tmp_path / "a") == result  # it has been done


def test_a_trial_against_epochs(tmp_path):
    result = trial(x=None).run(tmp_path / "a")
    assert [point.x for point in trial(x=None).points] == [1, 2]
    assert [trial(x=None).reading(result, point) for point in trial(x=None).points] == result["curve"]


def test_a_stopped_trial_goes_on(tmp_path, monkeypatch):
    whole = trial().run(tmp_path / "a")
    step, count = lf.recurrent.RecurrentLearner.step, iter(range(100))

    def press(self, *stretch):
        if next(count) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(self, *stretch)

    with monkeypatch.context() as patched:
        patched.setattr(lf.recurrent.RecurrentLearner, "step", press)
        with pytest.raises(KeyboardInterrupt):
            trial().run(tmp_path / "b")
    assert untimed(trial().run(tmp_path / "b")) == untimed(whole)


def test_a_trial_that_breaks_is_a_result(tmp_path):
    wild = trial(x=None, optimizer="sgd", learning_rate=1e38, bootstrap="none", auxiliary=False)
    result = wild.run(tmp_path / "a")
    assert "lower the learning rate" in result["diverged"]
    assert len(result["curve"]) == 1
    assert wild.reading(result, Point("p", 2)) == result["curve"][0] or math.isnan(result["curve"][0])


def test_a_trial_of_other_data_is_refused():
    with pytest.raises(ValueError, match="data='austen': the task char-lm takes its sequences from 'shakespeare-sample'"):
        RecurrentTrial(
            panel="p", series="s", x=1, seed=0, data="austen", measure="bits_per_character", settings=SMALL | KINDS["text"]
        )


def test_memory_does_not_grow_with_the_length_of_sequences():
    size = Size(units=8, batch=2)
    for name in BOOTSTRAPS:
        if name != "oracle":  # it looks at all that is to come
            short, long = (saved(BOOTSTRAPS[name](), False, length, size, horizon=4) for length in (24, 240))
            assert short == long > 0, name


def test_the_benchmark_runs():
    found = recurrent(rounds=1, repeats=1, horizons=(20,), lengths=(16, 32), size=Size(units=8, batch=2))
    assert found["dni_saved_32_over_16"] == 1.0
    ratios = [name for name in found if name.endswith("_over_truncated_T20")]
    assert sorted(ratios) == [
        f"{name}_over_truncated_T20" for name in ("dni_auxiliary", "dni_gamma", "dni_linear", "dni", "dni_solved")
    ]
    assert all(found[name] > 0 for name in [*ratios, "engine_over_plain_T20"])
