"""The morphology benchmark: wrong contenders are caught, absent ones say so; no times here."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import benchmark_modules

benchmark_modules.load()

from benchmarks import (  # noqa: E402
    _answers,
    _cli,
    _memory,
    _morphology_cases,
    _morphology_contenders,
    _morphology_memory,
    _morphology_tables,
    _record,
    _timing,
    morphology,
    report,
)

CPU = torch.device("cpu")
SETTINGS = morphology.Settings(quick=True, rounds=1, budget_seconds=0.1)
Case = _morphology_cases.Case
IMAGES, VOLUMES = _morphology_cases.cases("cpu", quick=True)


class _SmallBandwidth:
    """Stands in for the bandwidth measurement, whose figures no test looks at."""

    contender = _timing.Contender("read", lambda: None)
    bytes = 2**20


def _in_this_process(case):
    return replace(_morphology_memory.peak(case, CPU), bytes=2 * case.case.bytes)


def _hurry(patch):
    patch.setattr(_timing, "_BLOCK_SECONDS", 0.0)
    patch.setattr(_timing._HostClock, "settle_seconds", 0.0)
    patch.setattr(_timing._HostClock, "evict", lambda self: None)
    patch.setattr(morphology, "Bandwidth", lambda device, quick: _SmallBandwidth())
    patch.setattr(_morphology_memory, "in_fresh_process", _in_this_process)


def _require_peers():
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    pytest.importorskip("kornia", reason="kornia is not installed")
    pytest.importorskip("scipy", reason="SciPy is not installed")


@pytest.fixture(scope="module")
def result():
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        _hurry(patch)
        found = morphology.run(CPU, SETTINGS, lambda *row: seen.append(row))
    total = len(found["rows"]) + len(found["memory"])
    assert [(number, count) for _, number, count in seen] == [(n, total) for n in range(total)]
    return json.loads(json.dumps(_record.environment(CPU) | found))


@pytest.fixture
def measured(result):
    """A copy, as of a full run of a closing of size 3."""
    return json.loads(json.dumps(result)) | {"quick": False}


def _section(text):
    return text.partition("## morphology\n")[2].partition("\n## ")[0]


def _save(folder: Path, result, name="morphology.json"):
    _record.write_json(folder / result["machine"]["device_slug"] / name, result)


def test_every_peer_is_checked_and_measured(result):
    _require_peers()
    images, volumes = result["rows"]
    both, alone = ["result", "gradient"], ["result"]
    pools = {"max_pool": both, "max_pool_by_axis": both}
    everyone = {"dpfast": both, "opencv": alone, "kornia": both, "scipy": alone} | pools
    images["checks"].pop("opencv_pool", None)  # where there are several threads
    assert images["checks"] == everyone
    assert volumes["checks"] == {"dpfast": both, "scipy": alone} | pools
    assert volumes["not_measured"]["opencv"] == "OpenCV has no volumes"
    assert volumes["not_measured"]["kornia"] == "kornia has no volumes"
    assert {"kornia", "kornia_backward", "scipy", "dpfast", "dpfast_nearest"} <= images[
        "few_rounds_seconds"
    ].keys()
    assert {f"{name}_over_dpfast" for name in everyone if name != "dpfast"} <= images[
        "ratios"
    ].keys()
    assert {"share_of_bandwidth", "backward_over_forward", "kornia_backward_over_dpfast"} <= images[
        "ratios"
    ].keys()
    assert not images["failed"]
    assert not volumes["failed"]


SMALL = [
    Case((1, 3, 17, 20), (31,)),
    Case((2, 3, 17, 20), (3, 7, 5)),
    Case((2, 3, 17, 20), (3,), operation="dilation"),
    Case((1, 2, 40, 23), (15,), element="ellipse"),
    Case((2, 3, 17, 20), (7,), dtype="bfloat16"),
    Case((1, 2, 9, 12, 10), (7,)),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_all_kinds_of_rows_have_right_answers(case):
    with _morphology_contenders.threads(2):  # so that OpenCV's pool takes part
        field = morphology._field(_morphology_cases.Work(case, CPU))
    assert not field.failed
    assert field.checks["dpfast"] == ["result", "gradient"]
    if case.element == "box":
        assert {"max_pool", "max_pool_by_axis"} <= field.checks.keys()
    if "opencv" not in field.left_out:
        assert {"opencv", "opencv_pool"} <= field.checks.keys()


@pytest.mark.parametrize("what", ["forward", "backward"])
@pytest.mark.parametrize("mistake", [1e-6, float("nan")])
@pytest.mark.parametrize("name", ["dpfast", "max_pool"])
def test_a_wrong_answer_is_caught_before_it_is_timed(monkeypatch, what, mistake, name):
    def wrong(build, work):
        peer = build(work)

        def run():
            found = getattr(peer, what)().clone()
            found[1, 2, 3, 4] += mistake
            return found

        return replace(peer, **{what: run})

    if name == "dpfast":
        build = partial(wrong, _morphology_contenders.dpfast_peer)
        monkeypatch.setattr(morphology, "dpfast_peer", build)
    else:
        build = partial(wrong, _morphology_contenders.PEERS[name])
        monkeypatch.setitem(_morphology_contenders.PEERS, name, build)
    monkeypatch.setattr(morphology, "measure", lambda *_, **__: pytest.fail("was timed"))
    part = {"forward": "result", "backward": "gradient"}[what]
    with pytest.raises(_answers.WrongAnswerError, match=f"{name}: {part} must be exact, got 1 of"):
        morphology.run_case(IMAGES, CPU, _SmallBandwidth(), SETTINGS)


def test_a_wrong_shape_or_dtype_is_caught():
    x = torch.zeros(2, 3)
    for other in (x[:1], x.double()):
        with pytest.raises(_answers.WrongAnswerError, match=r"must be torch\.float32 of shape"):
            morphology._must_equal(IMAGES, "x", other, x)


def test_a_failing_peer_is_a_row_that_says_how(monkeypatch, tmp_path, measured):
    def fail(work):
        raise RuntimeError("no such\nthing")

    _hurry(monkeypatch)
    monkeypatch.setitem(_morphology_contenders.PEERS, "max_pool", fail)
    measured["rows"] = [morphology.run_case(IMAGES, CPU, _SmallBandwidth(), SETTINGS)]
    assert measured["rows"][0]["failed"] == {"max_pool": "RuntimeError: no such"}
    _save(tmp_path, measured)
    text = _section(report.render(tmp_path))
    assert "| failed: RuntimeError |" in text
    assert f"| max_pool | {IMAGES.label} | RuntimeError: no such |" in text


def test_absent_peers_are_left_out(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(_morphology_contenders.importlib, "import_module", absent)
    with _morphology_contenders.threads(1):
        field = morphology._field(_morphology_cases.Work(IMAGES, CPU))
    assert field.left_out == {
        "opencv": "OpenCV is not installed",
        "opencv_pool": "OpenCV is not installed",
        "kornia": "kornia is not installed",
        "scipy": "SciPy is not installed",
    }
    assert {"dpfast", "max_pool", "max_pool_by_axis"} == field.checks.keys()


def test_what_would_take_minutes_or_too_much_memory_is_left_out(monkeypatch):
    work = _morphology_cases.Work(IMAGES, CPU)
    monkeypatch.setitem(_morphology_contenders._MOST_COMPARISONS, "cpu", 1.0)
    with pytest.raises(_morphology_contenders.LeftOutError, match="takes minutes"):
        _morphology_contenders.PEERS["max_pool"](work)
    pytest.importorskip("kornia", reason="kornia is not installed")
    monkeypatch.setattr(_morphology_contenders, "available_bytes", lambda device: 2**10)
    with pytest.raises(_morphology_contenders.LeftOutError, match="GiB are left"):
        _morphology_contenders.PEERS["kornia"](work)
    work.case = replace(IMAGES, sizes=(5,))
    with pytest.raises(_morphology_contenders.LeftOutError, match="only boxes of 3 and 15"):
        _morphology_contenders.PEERS["kornia"](work)


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    with _morphology_contenders.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
        assert cv2.getNumThreads() == before + 1
    assert torch.get_num_threads() == before


def test_inputs_have_distinct_values_of_both_signs():
    for case in (IMAGES, VOLUMES):
        x = _morphology_cases.Work(case, CPU).x
        assert x.unique().numel() == case.numel
        assert x.min() < 0 < x.max()
    largest = max(case.numel for case in _morphology_cases.cases("cuda", quick=False))
    assert largest <= 2**25
    ends = (torch.tensor([0, 1, largest - 2, largest - 1]) - largest // 2) * _morphology_cases._STEP
    assert ends.unique().numel() == 4


def test_rows_are_those_of_the_targets():
    rows = _morphology_cases.cases("cpu", quick=False)
    for one_thread in (False, True):
        found = [case for case in rows if case.axes == 2 and case.one_thread == one_thread]
        sizes = [case.sizes[0] for case in found if _morphology_tables.opencv_target(case)]
        assert sizes == [3, 5, 7, 9, 15, 21, 31]
    assert [case.sizes[0] for case in rows if case.axes == 3] == [3, 7, 15, 31]
    assert len({case.label for case in rows}) == len(rows)
    kornia = {case.sizes[0]: _morphology_tables.kornia_target(case, "cpu") for case in rows[:7]}
    assert {size: least for size, least in kornia.items() if least} == {3: 50.0, 15: 500.0}
    assert _morphology_tables.kornia_target(rows[1], "cuda") == 10.0


@pytest.mark.slow
def test_memory_of_a_fresh_process_counts_what_a_pass_holds():
    case = Case((2, 4, 512, 512), (3,))
    found = _morphology_memory.in_fresh_process(_morphology_cases.MemoryCase("dpfast", case))
    # At least result and gradient; an index and a thread's workspace come on top.
    assert 2 * case.bytes <= found.bytes < 6 * case.bytes


def test_a_failure_of_a_peers_process_is_told_and_of_dpfasts_raised(monkeypatch):
    def killed(case):
        raise _memory.MemoryRunError("killed by signal 9")

    monkeypatch.setattr(_morphology_memory, "in_fresh_process", killed)
    kornia = _morphology_cases.MemoryCase("kornia", IMAGES)
    assert _morphology_memory.run_memory_case(kornia, CPU)["failed"] == "killed by signal 9"
    with pytest.raises(_memory.MemoryRunError, match="killed by signal 9"):
        _morphology_memory.run_memory_case(replace(kornia, contender="dpfast"), CPU)


def _set(row, **ratios):
    for name, value in ratios.items():
        row["ratios"][name] = {"median_of_rounds": value, "of_medians": value}


def _table(tmp_path, result, number):
    """Cells of a table of the report, by its place in the section on the CPU."""
    _save(tmp_path, result)
    text = _section(report.render(tmp_path)).partition("### CUDA")[0]
    blocks = [block for block in text.split("\n\n") if block.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in blocks[number].splitlines()]


def test_report_marks_missed_targets(tmp_path, measured):
    row = measured["rows"][0]
    _set(row, backward_over_forward=4.01, kornia_backward_over_dpfast=49.0)
    _set(row, opencv_over_dpfast=1.5, opencv_pool_over_dpfast=1.6)
    headings, _, cells, _ = _table(tmp_path, measured, 0)
    assert cells[headings.index("OpenCV / dpfast")] == "1.50x"
    _set(row, opencv_pool_over_dpfast=0.9)  # the faster way counts
    headings, _, cells, _ = _table(tmp_path, measured, 0)
    assert cells[headings.index("OpenCV / dpfast")] == "0.90x (missed)"
    headings, _, cells, _ = _table(tmp_path, measured, 1)
    assert cells[headings.index("over result alone")] == "4.01x (missed)"
    assert cells[headings.index("kornia / dpfast")] == "49.00x (missed)"
    _set(row, backward_over_forward=3.99, kornia_backward_over_dpfast=51.0)
    headings, _, cells, _ = _table(tmp_path, measured, 1)
    assert cells[headings.index("over result alone")] == "3.99x"
    assert cells[headings.index("kornia / dpfast")] == "51.00x"


def test_report_marks_memory_above_the_target_or_growing(tmp_path, measured):
    (small,) = measured["memory"]
    larger = json.loads(json.dumps(small))
    larger["case"]["sizes"], larger["memory_over_input"] = [15], 3.1
    failed = {"contender": "kornia", "case": small["case"], "failed": "killed by signal 9"}
    measured["memory"] = [small, larger, failed]
    _, _, *rows = _table(tmp_path, measured, 2)
    assert [row[2:] for row in rows] == [
        ["dpfast", "2.00x", "1.00x"],
        ["dpfast", "3.10x (missed)", "1.55x (missed)"],
        ["kornia", "failed: killed by signal 9", "not measured"],
    ]


def test_report_says_not_measured_without_results(tmp_path, result):
    _save(tmp_path, result, "quick-morphology.json")
    text = _section(report.render(tmp_path))
    assert "### CPU: not measured" in text
    assert "### CUDA: not measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| 8x9x224x224 | closing | 3 |")]
    assert len(rows) == 6
    assert all("x (" not in row and row.count("not measured") >= 6 for row in rows)


def test_cuda_without_a_device_is_not_measured_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _cli.main(["morphology", "--device", "cuda"]) == 1
    captured = capsys.readouterr()
    assert "64x9x224x224" in captured.out
    assert "there is no CUDA device" in captured.err
