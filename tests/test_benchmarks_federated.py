"""The federated benchmark: where the time goes is told apart, and misses are marked; no limits."""

import json

import pytest
import torch

pytest.importorskip("flwr")

from tests import benchmark_modules

benchmark_modules.load()

from benchmarks import (  # noqa: E402
    _cli,
    _federated_cases,
    _federated_run,
    _federated_tables,
    federated,
)
from benchmarks._memory import Memory  # noqa: E402

CASE = _federated_cases.cases(quick=True)[0]


def test_parts_of_the_time_add_up():
    seconds = _federated_run.run(CASE)
    assert 0.0 < seconds.steps < seconds.training
    assert seconds.training + seconds.evaluation < seconds.total
    assert seconds.outside == pytest.approx(seconds.total - seconds.training - seconds.evaluation)


def test_a_row_is_saved_and_shown(monkeypatch, tmp_path, capsys):
    asked = []

    def worker(module, request):
        asked.append((module, request))
        return Memory(10**6, 1, "VmHWM")

    monkeypatch.setattr(federated, "run_worker", worker)
    assert _cli.main(["federated", "--quick", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "quick-federated.json").read_text())
    assert result["rows"][0]["case"]["sites"] == CASE.sites
    assert result["memory"][0]["bytes"] == 10**6
    assert asked[0][0] == "benchmarks._federated_worker"
    assert "outside the sites" in capsys.readouterr().out.replace("\n", " ")


def test_misses_are_marked():
    case = {**CASE.__dict__, "channels": list(CASE.channels)}
    row = {
        "case": case,
        "seconds": [{"total": 1.0}],
        "outside_over_training": 0.03,
        "spread": 0.0,
        "site_over_steps": 0.5,
    }
    memory = [
        {"case": case, "bytes": each, "base_bytes": 10**6 * each, "model": 100}
        for each in (100, 120)
    ]
    time, held = _federated_tables.tables({"rows": [row], "memory": memory})
    assert "3.00 % (missed)" in time.rows[0]
    assert held.rows[0][-1] == "1.00x"
    assert held.rows[1][-1] == "1.20x (missed)"
    assert [row[3] for row in held.rows] == ["0.0", "20.0"]
    row["outside_over_training"] = 0.019
    assert "1.90 %" in _federated_tables.tables({"rows": [row], "memory": []})[0].rows[0]


def test_it_is_measured_on_the_cpu_alone():
    with pytest.raises(SystemExit):
        _cli.main(["federated", "--device", "cuda", "--quick"])


def test_worker_measures_in_a_process_of_its_own():
    found = federated.run_worker(
        "benchmarks._federated_worker",
        {"case": {**CASE.__dict__, "channels": [8, 16]}},
    )
    assert found.bytes > 0
    assert torch.get_num_threads() > 0
