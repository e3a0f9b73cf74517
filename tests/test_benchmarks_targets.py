"""The table of targets: figures come from saved rows, and a missed one is marked."""

import copy
import json

import pytest

from tests import benchmark_modules

pytest.importorskip("monai")
pytest.importorskip("pydantic")
benchmark_modules.load()

from benchmarks import _targets  # noqa: E402
from benchmarks._ops import OPS  # noqa: E402
from benchmarks._record import RESULTS  # noqa: E402
from benchmarks._text import NOT_MEASURED  # noqa: E402
from benchmarks.report import load_results, render  # noqa: E402


@pytest.fixture(scope="module")
def saved():
    found = {op: load_results(RESULTS, op) for op in OPS}
    assert all(found.values()), "the repository holds results of every op"
    return found


def _row(results, words):
    (row,) = [row for row in _targets.table(results).rows if words in row[0]]
    return row


def test_without_results_nothing_is_measured():
    rows = _targets.table([]).rows
    assert len(rows) == len(_targets.TARGETS)
    for _, cpu_target, cpu, cuda_target, cuda in rows:
        assert cpu == ("-" if cpu_target == "-" else NOT_MEASURED)
        assert cuda == ("-" if cuda_target == "-" else NOT_MEASURED)


def test_every_target_of_a_measured_op_has_figures(saved):
    everything = [result for results in saved.values() for result in results]
    for what, target, cpu, *_ in _targets.table(everything).rows:
        assert ("met in" in cpu) == (target != "-"), what


def test_the_worst_row_decides(saved):
    result = copy.deepcopy(saved["step"][0])
    limits = [row for row in result["rows"] if row["case"]["network"] == "UNet 2D"]
    for row in limits:
        row["time_over_ordinary"]["dpfast"]["median_of_rounds"] = 1.05
    result["rows"] = limits
    assert _row([result], "DP step: time")[2] == "1.05x; met in 1 of 1 rows"
    limits[0]["time_over_ordinary"]["dpfast"]["median_of_rounds"] = 1.06
    assert _row([result], "DP step: time")[2] == "1.06x; met in 0 of 1 rows (missed)"


def test_a_lower_limit_is_one(saved):
    result = copy.deepcopy(saved["clip_and_noise"][0])
    result["rows"] = [row for row in result["rows"] if row["case"]["mebibytes"] == 64][:2]
    for row, share in zip(result["rows"], (0.86, 0.5), strict=True):
        row["ratios"]["share_of_bandwidth"]["median_of_rounds"] = share
    row = _row([result], "clip_and_noise, float32")
    assert row[2] == "50.0 % to 86.0 %; met in 1 of 2 rows (missed)"


def test_opencv_counts_with_its_faster_way(saved):
    result = copy.deepcopy(saved["morphology"][0])
    result["rows"] = result["rows"][:1]
    ratios = result["rows"][0]["ratios"]
    ratios["opencv_over_dpfast"]["median_of_rounds"] = 3.0
    ratios["opencv_pool_over_dpfast"]["median_of_rounds"] = 0.9
    assert _row([result], "OpenCV")[2] == "0.90x; met in 0 of 1 rows (missed)"


def test_cuda_has_limits_of_its_own(saved):
    result = copy.deepcopy(saved["morphology"][0])
    result["machine"]["device_type"] = "cuda"
    table = _targets.table([result]).rows
    assert _row([result], "OpenCV")[3:] == ["-", "-"]
    (row,) = [r for r in table if r[0] == "closing: share of the bandwidth"]
    assert row[1:3] == ["-", "-"]
    assert "met in" in row[4]


def test_the_report_begins_with_the_targets(tmp_path, saved):
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "step.json").write_text(json.dumps(saved["step"][0]))
    text = render(tmp_path)
    assert text.index("## targets") < text.index("## clip_and_noise")
    assert "| DP step: time over the ordinary step's | at most 1.05x | 0." in text
