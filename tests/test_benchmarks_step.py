"""The step benchmark: wrong contenders are caught and failing peers are rows; no times here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import benchmark_modules

pytest.importorskip("monai")
pytest.importorskip("einops", reason="MONAI's transformers rearrange with einops")
benchmark_modules.load()

from benchmarks import (  # noqa: E402
    _answers,
    _cli,
    _networks,
    _record,
    _step_answers,
    _step_contenders,
    _step_tables,
    _step_task,
    _timing,
    report,
    step,
)

CPU = torch.device("cpu")
SETTINGS = step.Settings(quick=True, rounds=1, budget_seconds=0.1)
CASE, IN_PLACE_CASE = step.cases("cpu", quick=True)
PRIVATE = [name for name in _step_contenders.STEPS if name != "ordinary"]


def _hurry(patch):
    patch.setattr(_timing, "_BLOCK_SECONDS", 0.0)
    patch.setattr(_timing._HostClock, "settle_seconds", 0.0)


@pytest.fixture
def quick(monkeypatch):
    _hurry(monkeypatch)


@pytest.fixture(scope="module")
def result():
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        _hurry(patch)
        found = step.run(CPU, SETTINGS, lambda *row: seen.append(row))
    total = len(found["rows"])
    assert [(number, count) for _, number, count in seen] == [(n, total) for n in range(total)]
    return json.loads(json.dumps(_record.environment(CPU) | found))


@pytest.fixture(scope="module")
def task():
    return _step_task.Task(CASE, CPU)


def _section(text):
    """The report's part on the step."""
    return text.partition("\n## step\n")[2].partition("\n## ")[0]


def test_every_quick_row_has_checked_answers_and_the_documented_fields(result):
    for row in result["rows"]:
        works = row["seconds"].keys()
        assert {"ordinary", "dpfast", "torch_func"} <= works
        assert works == row["time_over_ordinary"].keys()
        assert works | row["not_measured"].keys() == _step_contenders.STEPS.keys()
        assert row["checks"].keys() == works - {"ordinary"} | {"loss"}
        for name in works - {"ordinary"}:
            assert row["checks"][name]["relative_error_in_float64"] <= 1e-5
            assert row["checks"][name]["relative_error"] <= 5e-3
        assert row["time_over_ordinary"]["ordinary"]["median_of_rounds"] == 1.0


def test_in_place_activations_are_a_failure_of_opacus_and_no_error(result):
    pytest.importorskip("opacus")
    _, row = result["rows"]
    for name in ("opacus_hooks", "opacus_functorch", "opacus_ghost"):
        assert "RuntimeError: Output 0 of BackwardHookFunction" in row["not_measured"][name]
        assert name not in row["seconds"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", [name for name in PRIVATE if name != "fastdp"])
def test_every_contender_is_right_on_the_tiny_unet(task, name):
    for package in ("opacus", "opake"):
        if name.startswith(package):
            pytest.importorskip(package)
    answer = _step_answers.reference(task)
    _step_answers.check_step(
        name, _step_contenders.STEPS[name], task, answer, _step_answers.ROUNDED
    )


class _KnownToFastdp(_step_task.Task):
    """A network of layers that fastDP knows, where the UNet has transposed convolutions."""

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return torch.nn.Sequential(
                torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)
            )


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_fastdp_is_right_where_it_knows_the_layers_and_caught_where_it_does_not(task):
    pytest.importorskip("fastDP")
    build = _step_contenders.STEPS["fastdp"]
    known = _KnownToFastdp(CASE, CPU)
    answer = _step_answers.reference(known)
    _step_answers.check_step("fastdp", build, known, answer, _step_answers.ROUNDED)
    answer = _step_answers.reference(task)
    with pytest.raises(_answers.WrongAnswerError, match=r"fastdp: .*model\.0\..* and others"):
        _step_answers.check_step("fastdp", build, task, answer, _step_answers.ROUNDED)


def test_reference_clips_one_sample_at_least_and_leaves_one_at_least(task):
    answer = _step_answers.reference(task)
    tight, loose = (
        _step_contenders.DpfastStep(task, _step_task.Privacy(bound, 0.0))
        for bound in (answer.max_grad_norm * 0.99, 1e3)
    )
    for other in (tight, loose):
        other.run(task.batch)
        with pytest.raises(_answers.WrongAnswerError, match="relative error"):
            _step_answers.check_gradients(
                "other", other.gradients(), answer.gradients, _step_answers.EXACT, ""
            )


class _Unclipped(_step_contenders.DpfastStep):
    """Forgets the bound."""

    def __init__(self, task, privacy):
        super().__init__(task, replace(privacy, max_grad_norm=1e6 * privacy.max_grad_norm))


class _WithoutNoise(_step_contenders.DpfastStep):
    def __init__(self, task, privacy):
        super().__init__(task, replace(privacy, noise_multiplier=0.0))


class _WrongInTheSecondStep(_step_contenders.DpfastStep):
    steps = 0

    def run(self, batch):
        super().run(batch)
        self.steps += 1
        if self.steps == 2:
            next(iter(self.params.values())).grad *= 1.1


class _NaN(_step_contenders.DpfastStep):
    def run(self, batch):
        super().run(batch)
        next(iter(self.params.values())).grad.flatten()[0] = float("nan")


class _Raises(_step_contenders.DpfastStep):
    def run(self, batch):
        raise RuntimeError("the first line\nthe second line")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_Unclipped, "relative error"),
        (_WrongInTheSecondStep, "relative error"),
        (_NaN, "relative error"),
        (_WithoutNoise, "noise must have mean 0"),
    ],
)
@pytest.mark.parametrize("name", ["dpfast", "torch_func"])
def test_a_wrong_contender_is_caught_before_it_is_timed(monkeypatch, quick, wrong, message, name):
    monkeypatch.setattr(step, "STEPS", {**step.STEPS, name: wrong})
    if name == "dpfast":
        monkeypatch.setattr(step, "measure", lambda *_, **__: pytest.fail("was timed"))
        with pytest.raises(_answers.WrongAnswerError, match=f"dpfast: {message}"):
            step.run_case(CASE, CPU, SETTINGS)
        return
    row = step.run_case(CASE, CPU, SETTINGS)
    assert row["not_measured"]["torch_func"].startswith(f"WrongAnswerError: torch_func: {message}")
    assert "torch_func" not in row["seconds"]


def test_a_peer_that_raises_is_told_by_type_and_first_line(monkeypatch, quick):
    monkeypatch.setattr(step, "STEPS", {**step.STEPS, "torch_func": _Raises})
    row = step.run_case(CASE, CPU, SETTINGS)
    assert row["not_measured"]["torch_func"] == "RuntimeError: the first line"
    monkeypatch.setattr(step, "STEPS", {**step.STEPS, "dpfast": _Raises})
    with pytest.raises(RuntimeError, match="the first line"):
        step.run_case(CASE, CPU, SETTINGS)


def test_a_missing_parameter_is_caught(task):
    answer = _step_answers.reference(task)
    some = dict(list(answer.gradients.items())[1:])
    with pytest.raises(_answers.WrongAnswerError, match="differing are"):
        _step_answers.check_gradients("x", some, answer.gradients, _step_answers.ROUNDED, "")


def test_a_batch_loss_that_is_no_mean_of_the_samples_is_caught():
    task = _step_task.Task(CASE, CPU)
    assert _step_answers.check_loss(task) <= 1e-6
    task.loss.dice.reduction = task.loss.cross_entropy.reduction = "sum"
    with pytest.raises(_answers.WrongAnswerError, match=r"must be the batch's loss"):
        _step_answers.check_loss(task)


@pytest.mark.parametrize("network", _networks.NETWORKS, ids=lambda network: network.name)
def test_every_network_is_built_without_what_couples_or_draws(network):
    model = _networks.built(network)
    for module in model.modules():
        assert not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        assert getattr(module, "drop_connect_rate", 0.0) == 0.0
        if "Dropout" in type(module).__name__:
            assert module.p == 0.0


def test_unets_have_the_documented_numbers_of_parameters():
    counts = {
        name: sum(p.numel() for p in _networks.built(_networks.network_of(name)).parameters())
        for name in ("UNet 2D", "UNet 3D")
    }
    assert {name: round(count / 1e6, 2) for name, count in counts.items()} == {
        "UNet 2D": 0.40,
        "UNet 3D": 1.19,
    }


def test_unused_parameters_are_frozen():
    case = _step_task.Case("BasicUNet++ 2D", 1, (32, 32), memory_budget=1.1)
    names = {n for n, p in _step_task.Task(case, CPU).model().named_parameters() if p.requires_grad}
    assert "final_conv_0_4.weight" in names
    assert "final_conv_0_1.weight" not in names


def test_targets_are_for_the_four_named_networks():
    named = [case for case in step.cases("cpu", quick=False) if case.network.count("3D") < 2]
    targets = {c.network: _step_tables.time_target(c, "cpu") for c in named}
    assert {name for name, target in targets.items() if target is not None} == {
        "UNet 2D",
        "UNet 3D",
        "SegResNet 3D",
        "DynUNet 3D",
    }
    unet = step.cases("cuda", quick=False)[0]
    assert (unet.batch_size, unet.size) == (32, (256, 256))
    assert _step_tables.time_target(unet, "cuda") == 1.15
    assert _step_tables.time_target(unet, "cpu") == 1.05


def _save(folder, result, name="step.json"):
    _record.write_json(folder / result["machine"]["device_slug"] / name, result)


@pytest.mark.parametrize(("time", "shown"), [(1.04, "1.04x"), (1.06, "1.06x (missed)")])
def test_report_marks_missed_targets(tmp_path: Path, result, time, shown):
    """The result as if its first network were UNet 2D, with a given ratio for dpfast."""
    changed = json.loads(json.dumps(result)) | {"quick": False}
    row = changed["rows"][0]
    row["case"]["network"] = "UNet 2D"
    row["time_over_ordinary"]["dpfast"]["median_of_rounds"] = time
    _save(tmp_path, changed)
    lines = _section(report.render(tmp_path)).splitlines()
    line = next(line for line in lines if line.startswith("| UNet 2D"))
    assert line.split(" | ")[4] == shown


def test_report_shows_failures_and_cuda_as_not_measured(tmp_path: Path, result):
    pytest.importorskip("opacus")
    _save(tmp_path, result | {"quick": False})
    text = _section(report.render(tmp_path))
    assert "### CPU: " + result["machine"]["device"] in text
    assert "### CUDA: not measured" in text
    assert "failed: RuntimeError" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| Opacus hooks |"))
    assert "tiny BasicUNet 2D | RuntimeError: Output 0 of BackwardHookFunction" in line


def test_report_says_not_measured_without_results(tmp_path: Path, result):
    _save(tmp_path, result, "quick-step.json")
    text = _section(report.render(tmp_path))
    assert "### CPU: not measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| SwinUNETR 2D")]
    assert len(rows) == 1
    assert all(row.count("not measured") >= 7 for row in rows)


def test_cuda_without_a_device_is_not_measured_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _cli.main(["step", "--device", "cuda"]) == 1
    captured = capsys.readouterr()
    assert "32x1x256x256" in captured.out
    assert "there is no CUDA device" in captured.err


def test_command_line_names_the_packages_that_are_lacking(monkeypatch, capsys):
    monkeypatch.setattr(_cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        _cli.main(["step", "--quick"])
    assert "step needs monai and einops" in capsys.readouterr().err
