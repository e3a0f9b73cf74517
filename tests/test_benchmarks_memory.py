"""The memory benchmark: peaks are those of a step, in fresh processes; quick rows here."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import benchmark_modules
from tests.benchmark_modules import ROOT

pytest.importorskip("monai")
pytest.importorskip("einops", reason="MONAI's transformers rearrange with einops")
benchmark_modules.load()

from benchmarks import (  # noqa: E402
    _answers,
    _memory,
    _memory_tables,
    _networks,
    _record,
    _step_contenders,
    _step_task,
    _timing,
    memory,
    report,
    step,
)

CPU = torch.device("cpu")
CASE, IN_PLACE_CASE = memory.cases("cpu", quick=True)


def _in_this_process(case, contender):
    task = _step_task.Task(case, CPU)
    build = _step_contenders.STEPS[contender]
    return replace(_memory.peak(build(task, _step_task.Privacy())), bytes=2**20)


def _hurry(patch):
    patch.setattr(_timing._HostClock, "settle_seconds", 0.0)
    patch.setattr(memory, "in_fresh_process", _in_this_process)


@pytest.fixture
def quick(monkeypatch):
    _hurry(monkeypatch)


@pytest.fixture(scope="module")
def result():
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        _hurry(patch)
        settings = memory.Settings(quick=True, rounds=1)
        found = memory.run(CPU, settings, lambda *row: seen.append(row))
    total = len(found["rows"]) + len(found["batches"])
    assert [(number, count) for _, number, count in seen] == [(n, total) for n in range(total)]
    return json.loads(json.dumps(_record.environment(CPU) | found))


def _section(text):
    """The report's part on memory."""
    return text.partition("\n## memory\n")[2].partition("\n## ")[0]


def test_rows_are_those_of_the_step():
    for device_type in ("cpu", "cuda"):
        rows = memory.cases(device_type, quick=False)
        assert rows == step.cases(device_type, quick=False)


def test_every_quick_row_has_checked_answers_and_the_documented_fields(result):
    for row in result["rows"]:
        assert {"ordinary", "dpfast"} <= row["memory"].keys() <= _step_contenders.STEPS.keys()
        assert row["memory"].keys() == row["memory_over_ordinary"].keys()
        assert not row["memory"].keys() & row["not_measured"].keys()
        assert {"bytes", "base_bytes", "method"} == row["memory"]["dpfast"].keys()
        assert row["memory_over_ordinary"]["ordinary"] == 1.0
        assert row["checks"]["dpfast"]["relative_error_in_float64"] <= 1e-5
    for row in result["batches"]:
        assert row["case"]["batch_size"] == 8 * CASE.batch_size
        assert "ordinary" in row["seconds"]
        assert len(row["seconds"]) == len(row["memory"])


def test_a_wrong_step_is_not_measured(monkeypatch, quick):
    class Wrong(_step_contenders.DpfastStep):
        def run(self, batch):
            super().run(batch.rows(0, 1))

    monkeypatch.setattr(memory, "STEPS", {**memory.STEPS, "dpfast": Wrong})
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: pytest.fail("was measured"))
    with pytest.raises(_answers.WrongAnswerError, match="relative error"):
        memory.run_case(CASE, CPU)


def test_a_process_that_fails_is_a_row_for_a_budget_and_an_error_for_dpfast(monkeypatch, quick):
    fails = "dpfast_budget"

    def die(case, contender):
        if contender == fails:
            raise _memory.MemoryRunError("killed by signal 9")
        return _in_this_process(case, contender)

    monkeypatch.setattr(memory, "in_fresh_process", die)
    row = memory.run_case(CASE, CPU)
    assert fails not in row["memory"]
    assert fails in row["not_measured"]
    fails = "dpfast"
    with pytest.raises(_memory.MemoryRunError, match="killed by signal 9"):
        memory.run_case(CASE, CPU)


@pytest.mark.slow
def test_memory_of_a_fresh_process_counts_what_a_step_holds():
    wide = replace(CASE, size=(256, 256))  # activations of some MiB, far above a page
    found = _memory.in_fresh_process(wide, "ordinary")
    activations = 4 * 4 * wide.batch_size * 128 * 128  # one layer's: 4 channels at half the size
    assert activations < found.bytes < 100 * activations
    assert found.base_bytes > 2**26


@pytest.mark.slow
def test_a_failure_in_a_fresh_process_is_told():
    pytest.importorskip("opacus")
    with pytest.raises(_memory.MemoryRunError, match=r"^RuntimeError: Output 0 of Backward"):
        _memory.in_fresh_process(IN_PLACE_CASE, "opacus_hooks")


def test_peak_is_read_elsewhere_where_it_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(_memory, "_reset_peak", lambda: False)
    task = _step_task.Task(CASE, CPU)
    found = _memory.peak(_step_contenders.STEPS["ordinary"](task, _step_task.Privacy()))
    assert found.method == "ru_maxrss"
    assert found.bytes >= 0


def test_targets_are_for_the_four_named_networks():
    rows = memory.cases("cpu", quick=False)
    named = {c.network for c in rows if _memory_tables.memory_target(c, "cpu") is not None}
    assert named == {"UNet 2D", "UNet 3D", "SegResNet 3D", "DynUNet 3D"}
    assert named == {case.network for case in memory.batch_cases("cpu", quick=False)}
    assert _memory_tables.memory_target(rows[0], "cpu") == 1.10
    assert _memory_tables.memory_target(rows[0], "cuda") == 1.15


def _save(folder, result, name="memory.json"):
    _record.write_json(folder / result["machine"]["device_slug"] / name, result)


@pytest.mark.parametrize(("ratio", "shown"), [(1.09, "1.09x"), (1.11, "1.11x (missed)")])
def test_report_marks_missed_targets(tmp_path: Path, result, ratio, shown):
    changed = copy.deepcopy(result) | {"quick": False}
    changed["rows"][0]["case"]["network"] = "UNet 2D"
    changed["rows"][0]["memory_over_ordinary"]["dpfast"] = ratio
    _save(tmp_path, changed)
    lines = _section(report.render(tmp_path)).splitlines()
    line = next(line for line in lines if line.startswith("| UNet 2D"))
    assert line.split(" | ")[4] == shown


def test_report_marks_a_largest_batch_that_is_too_small(tmp_path: Path, result):
    changed = copy.deepcopy(result) | {"quick": False}
    row = changed["batches"][0]
    row["seconds"]["dpfast_budget"] = row["seconds"]["ordinary"]
    for ratio, shown in ((1.1, "0.91"), (1.25, "0.80 (missed)")):
        row["memory_over_ordinary"]["dpfast_budget"] = ratio
        _save(tmp_path, changed)
        lines = _section(report.render(tmp_path)).splitlines()
        (line,) = (line for line in lines if line.startswith("| tiny UNet 2D | 32x"))
        assert line.split(" | ")[5] == shown


def test_report_says_not_measured_without_results(tmp_path: Path, result):
    _save(tmp_path, result, "quick-memory.json")
    text = _section(report.render(tmp_path))
    assert "### CPU: not measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| SwinUNETR 2D")]
    assert len(rows) == 1  # nor on CUDA, where it has none
    assert rows[0].count("not measured") >= 7


@pytest.mark.slow
def test_command_line_measures_memory_in_fresh_processes(tmp_path: Path):
    # A package without its extension module, as in a checkout that was installed elsewhere.
    work = tmp_path / "checkout"
    (work / "dpfast").mkdir(parents=True)
    (work / "dpfast" / "__init__.py").write_text("raise ImportError('the source folder won')")
    (work / "benchmarks").mkdir()
    for module in (ROOT / "benchmarks").glob("*.py"):
        (work / "benchmarks" / module.name).write_text(module.read_text())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "memory", "--quick", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--output", str(out), "--commit", "abc"],
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((out / "quick-memory.json").read_text())
    assert len(saved["rows"]) == len(_networks.QUICK_NETWORKS)
    for row in saved["rows"]:
        assert row["memory"]["dpfast"]["bytes"] > 0
