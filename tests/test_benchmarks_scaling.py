"""The scaling benchmark: processes that train together agree, and the ratios are what they say."""

import json
import math

import pytest
import torch

from tests import benchmark_modules

pytest.importorskip("monai")
benchmark_modules.load()

from benchmarks import _cli, _scaling_tables, _targets, scaling  # noqa: E402
from benchmarks.scaling import Case  # noqa: E402

CASE = scaling.cases("cpu", quick=True)[0]


def _result(efficiency, device_type="cpu"):
    figures = {
        "samples_per_second": {"alone": {"median": 10.0}},
        "efficiency": {
            "apart": {"median": 0.99},
            "together": {"median": efficiency, "spread": 0.01},
        },
        "together_over_apart": 0.98,
    }
    row = {"case": CASE.__dict__, "contenders": dict.fromkeys(scaling.CONTENDERS, figures)}
    machine = {"device_type": device_type}
    return {"op": "scaling", "quick": False, "machine": machine, "rows": [row]}


def test_two_processes_train_one_model_and_are_compared_with_one(tmp_path, capsys):
    assert _cli.main(["scaling", "--quick", "--rounds", "1", "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "quick-scaling.json").read_text())["rows"]
    assert Case.from_json(row["case"]) == CASE
    for contender in scaling.CONTENDERS:
        found = row["contenders"][contender]
        for mode in scaling.MODES:
            assert found["samples_per_second"][mode]["median"] > 0
        for mode in ("apart", "together"):
            assert math.isfinite(found["efficiency"][mode]["median"])
    assert "two together" in capsys.readouterr().out


class _Recorded:
    """A worker that answers from a list."""

    def __init__(self, *answers):
        self.told, self._answers = [], list(answers)

    def tell(self, message):
        self.told.append(message["mode"])

    def hear(self):
        return self._answers.pop(0)


def _answer(samples, seconds, digest="a"):
    return {"samples": samples, "seconds": seconds, "digest": digest}


def test_together_ends_with_the_slower_process():
    workers = [_Recorded(_answer(30, 3.0)), _Recorded(_answer(30, 6.0))]
    assert scaling._turn(workers, "dpfast", "together") == 10.0


def test_apart_each_process_has_its_own_clock():
    workers = [_Recorded(_answer(30, 3.0)), _Recorded(_answer(30, 6.0))]
    assert scaling._turn(workers, "dpfast", "apart") == 15.0


def test_alone_leaves_the_second_process_waiting():
    workers = [_Recorded(_answer(30, 3.0)), _Recorded()]
    assert scaling._turn(workers, "dpfast", "alone") == 10.0
    assert workers[1].told == []


def test_processes_that_disagree_are_an_error():
    workers = [_Recorded(_answer(1, 1.0, "a")), _Recorded(_answer(1, 1.0, "b"))]
    with pytest.raises(RuntimeError, match="weights are not the same"):
        scaling._turn(workers, "ordinary", "together")


def test_a_process_that_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(scaling, "_WORKER", "benchmarks.no_worker")
    with pytest.raises(RuntimeError, match="a process ended"):
        scaling.run_case(CASE, torch.device("cpu"), 1)


def test_misses_are_marked():
    (table,) = _scaling_tables.tables(_result(0.94))
    ours, ordinary = table.rows
    assert "0.94 (missed)" in ours
    assert "0.94" in ordinary
    (table,) = _scaling_tables.tables(_result(0.95))
    assert "0.95" in table.rows[0]


def test_the_target_is_in_the_table_of_targets():
    (row,) = [r for r in _targets.table([_result(0.93)]).rows if "scaling" in r[0]]
    assert row[2] == "0.93x; met in 0 of 1 rows (missed)"


def test_too_few_gpus_are_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = scaling.run(torch.device("cuda"), scaling.Settings(), lambda *_: None)
    assert found["rows"] == []
    (table,) = _scaling_tables.tables(found | {"machine": {"device_type": "cuda"}})
    assert table.rows
    assert "not measured" in table.rows[0]
