"""The benchmark harness: it checks answers, saves what it must and hides nothing; no times here."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import benchmark_modules
from tests.benchmark_modules import ROOT

benchmark_modules.load()

from benchmarks import (  # noqa: E402
    _answers,
    _cli,
    _opacus,
    _pytorch,
    _record,
    _tables,
    _timing,
    _workload,
    clip_and_noise,
    report,
)

CPU = torch.device("cpu")
SETTINGS = clip_and_noise.Settings(quick=True, rounds=1, budget_seconds=0.1)


class _SmallBandwidth:
    """Stands in for the bandwidth measurement, whose figures no test looks at."""

    contender = _timing.Contender("read", lambda: None)
    bytes = 2**20


def _hurry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_timing, "_BLOCK_SECONDS", 0.0)
    patch.setattr(_timing._HostClock, "settle_seconds", 0.0)
    patch.setattr(clip_and_noise, "Bandwidth", lambda device, quick: _SmallBandwidth())


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch)


@pytest.fixture(scope="module")
def result() -> dict:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        _hurry(patch)
        found = clip_and_noise.run(CPU, SETTINGS, lambda *row: seen.append(row))
    assert [number for _, number, _ in seen] == list(range(len(found["rows"])))
    return json.loads(json.dumps(_record.environment(CPU) | found))


def _section(text: str) -> str:
    """The report's part on clip_and_noise."""
    return text.partition("## clip_and_noise\n")[2].partition("\n## ")[0]


def _save(folder: Path, result: dict, name: str = "clip_and_noise.json") -> None:
    _record.write_json(folder / result["machine"]["device_slug"] / name, result)


def test_every_quick_row_has_right_answers_and_the_documented_fields(result: dict):
    assert {"date", "machine", "commit", "versions", "build", "op", "quick"} <= result.keys()
    assert {"device", "cores", "threads"} <= result["machine"].keys()
    peers = {"fastdp", "flower", "kornia", "monai", "opacus", "opake", "opencv", "scipy"}
    assert {"dpfast", "torch", "python"} | peers == result["versions"].keys()
    assert {"hash", "dirty"} == result["commit"].keys()
    assert result["build"]["instruction_set"]
    for row in result["rows"]:
        assert row["checks"]["dpfast"]["relative_error"] <= 2**-22
        assert {"dpfast", "dpfast_noiseless", "dpfast_new_output", "pytorch"} <= row[
            "seconds"
        ].keys()
        assert {"median", "min", "max", "spread", "rounds"} == row["seconds"]["dpfast"].keys()
        assert {"share_of_bandwidth", "noise_share", "pytorch_over_dpfast"} <= row["ratios"].keys()
        assert ("opacus" in row["seconds"]) != ("opacus" in row["not_measured"])
    assert {row["mechanism"] for row in result["noise"]} == {"gaussian", "laplace"}


def test_opacus_takes_part_in_flat_gaussian_rows(result: dict):
    pytest.importorskip("opacus")
    names = [set(row["checks"]) for row in result["rows"] if row["case"]["rule"] == "flat"]
    assert {"dpfast", "pytorch", "opacus"} in names


@pytest.mark.parametrize("mistake", [1e-3, -1e-3, float("nan")])
def test_a_wrong_sum_is_caught_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, quick_timing: None, mistake: float
):
    def wrong(work: _workload.Workload, noisy: bool) -> list[torch.Tensor]:
        out = clip_and_noise._dpfast(work, noisy=noisy)
        out[0][7] += mistake * work.scale[0][7]
        return out

    monkeypatch.setattr(clip_and_noise, "_run_pytorch", wrong)
    monkeypatch.setattr(clip_and_noise, "measure", lambda *_, **__: pytest.fail("was timed"))
    with pytest.raises(_answers.WrongAnswerError, match="pytorch: relative error"):
        clip_and_noise.run_case(_workload.Case(1, 16), CPU, _SmallBandwidth(), SETTINGS)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("factor", [2 / 3, 0.97, 1.03, 3 / 2])
def test_noise_of_another_scale_is_caught(mechanism: str, factor: float):
    case = _workload.Case(1, 16, mechanism=mechanism)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**17, generator=generator)
    if mechanism == "laplace":
        noise = torch.empty(2**17).exponential_(generator=generator) - torch.empty(
            2**17
        ).exponential_(generator=generator)
    _answers.check_noise(case, [noise], scale=1.0)
    with pytest.raises(_answers.WrongAnswerError, match="standard deviation"):
        _answers.check_noise(case, [noise * factor], scale=1.0)
    with pytest.raises(_answers.WrongAnswerError, match="mean 0"):
        _answers.check_noise(case, [noise + 0.05], scale=1.0)


@pytest.mark.parametrize("case", clip_and_noise.cases("cpu", quick=True))
def test_pytorch_ops_give_the_expected_answer(case: _workload.Case):
    work = _workload.Workload(case, CPU)
    _answers.check_sum(work, "pytorch", _pytorch.PytorchOps(work, 0.0)())


@pytest.mark.parametrize("count", [1, 30, 300])
def test_uneven_sizes_add_up_and_hold_small_and_big_tensors(count: int):
    for total in (4 * count, 2**18, 2**23):
        sizes = _workload.uneven_sizes(total, count)
        assert len(sizes) == count
        assert sum(sizes) == total
        assert min(sizes) >= 1
        assert sizes == _workload.uneven_sizes(total, count)


def test_norms_lie_on_both_sides_of_the_bound():
    for case in clip_and_noise.cases("cpu", quick=True):
        norms = _workload.Workload(case, CPU).norms
        assert norms.min() < _workload.MAX_GRAD_NORM < norms.max(), case


def test_a_row_that_does_not_fit_in_memory_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clip_and_noise, "available_bytes", lambda device: 2**20)
    row = clip_and_noise.run_case(_workload.Case(1, 16), CPU, _SmallBandwidth(), SETTINGS)
    assert "GiB are left" in row["skipped"]
    assert "seconds" not in row


def test_opacus_is_left_out_with_a_reason():
    pytest.importorskip("opacus")
    flat = _workload.Case(512, 16)
    assert _opacus.reason_to_skip(flat, 2**33) is None
    assert "GiB" in _opacus.reason_to_skip(flat, 2**20)
    for change in (
        {"rule": "automatic"},
        {"mechanism": "laplace"},
        {"given_norms": True},
        {"rows_per_unit": 4},
    ):
        assert "Opacus has no" in _opacus.reason_to_skip(replace(flat, **change), 2**40)


def test_contenders_take_turns_and_start_in_turn(quick_timing: None):
    order = []
    contenders = [
        _timing.Contender("a", lambda: order.append("a")),
        _timing.Contender("b", lambda: order.append("b"), reset=lambda: order.append("reset")),
    ]
    clock = _timing.clock_for(CPU)
    times = _timing.measure(contenders, clock, rounds=2, budget_seconds=1.0)
    assert order[-6:] == ["a", "reset", "b", "reset", "b", "a"]
    assert {name: len(values) for name, values in times.seconds.items()} == {"a": 2, "b": 2}
    assert times.yardstick == {"a": [], "b": []}


def test_the_yardstick_is_timed_before_and_after_every_turn(quick_timing: None):
    order = []
    contenders = [_timing.Contender(name, partial(order.append, name)) for name in "ab"]
    yardstick = _timing.Contender("|", partial(order.append, "|"))
    times = _timing.measure(
        contenders, _timing.clock_for(CPU), rounds=2, budget_seconds=1.0, yardstick=yardstick
    )
    assert "".join(order[-9:]) == "|a|b|b|a|"
    assert {name: len(values) for name, values in times.yardstick.items()} == {"a": 2, "b": 2}


def test_ratio_is_taken_round_by_round():
    # The machine halves its speed in the last two rounds; the ratio does not see it.
    found = _timing.ratio([2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0])
    assert found == _timing.Ratio(2.0, 2.0)
    assert _timing.ratio([1.0, 9.0, 9.0], [1.0, 1.0, 9.0]) == _timing.Ratio(1.0, 9.0)


def test_targets_are_for_float32_larger_than_the_caches():
    large = _workload.Case(64, 16)
    assert _tables.bandwidth_target(large) == 0.85
    assert _tables.noise_share_target(large, "cpu") == 0.15
    assert _tables.noise_share_target(large, "cuda") == 0.05
    assert _tables.noise_share_target(replace(large, batch_size=64), "cpu") == 0.05
    for other in (replace(large, mebibytes=8), replace(large, dtype="bfloat16")):
        assert _tables.bandwidth_target(other) is None
        assert _tables.noise_share_target(other, "cpu") is None


def test_report_says_not_measured_without_results(tmp_path: Path):
    text = _section(report.render(tmp_path))
    assert "### CPU: not measured" in text
    assert "### CUDA: not measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| 8 GiB")]
    assert rows
    assert all("%" not in row and row.count("not measured") == 7 for row in rows)


def test_report_shows_cpu_figures_and_cuda_as_not_measured(tmp_path: Path, result: dict):
    _save(tmp_path, result | {"quick": False})
    _save(tmp_path, result, "quick-clip_and_noise.json")
    text = _section(report.render(tmp_path))
    assert text.count("### CPU") == 1
    assert "### CPU: " + result["machine"]["device"] in text
    assert "### CUDA: not measured" in text
    for line in text.splitlines():
        if line.startswith("| 1 MiB") and "4 rows a unit" in line:
            assert "not measured: Opacus has no privacy units" in line
            break
    else:
        pytest.fail("the report lacks a row")


def test_report_leaves_quick_results_out(tmp_path: Path, result: dict):
    _save(tmp_path, result)
    assert "### CPU: not measured" in _section(report.render(tmp_path))


def test_cuda_without_a_device_is_not_measured_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _cli.main(["--device", "cuda", "--quick"]) == 1
    captured = capsys.readouterr()
    assert "not measured" in captured.out
    assert "there is no CUDA device" in captured.err


def test_interrupted_write_keeps_the_earlier_results(tmp_path: Path):
    path = tmp_path / "results.json"
    _record.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        _record.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_command_line_writes_results_from_the_repository_root(tmp_path: Path):
    # A package without its extension module, as in a checkout that was installed elsewhere.
    work = tmp_path / "checkout"
    (work / "dpfast").mkdir(parents=True)
    (work / "dpfast" / "__init__.py").write_text("raise ImportError('the source folder won')")
    (work / "benchmarks").mkdir()
    for module in (ROOT / "benchmarks").glob("*.py"):
        (work / "benchmarks" / module.name).write_text(module.read_text())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "clip_and_noise", "--quick", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--output", str(out), "--commit", "abc"],
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((out / "quick-clip_and_noise.json").read_text())
    assert saved["commit"] == {"hash": "abc", "dirty": None}
    assert len(saved["rows"]) == len(clip_and_noise.cases("cpu", quick=True))


def test_modules_are_imported_from_the_repository():
    assert isinstance(clip_and_noise, ModuleType)
    assert Path(clip_and_noise.__file__).parent == ROOT / "benchmarks"
