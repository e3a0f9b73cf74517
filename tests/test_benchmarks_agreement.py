"""Two runs of a benchmark: what moved, and whether by more than its spread."""

import copy
import json

import pytest

from tests import benchmark_modules

pytest.importorskip("monai")
pytest.importorskip("pydantic")
benchmark_modules.load()

from benchmarks import agreement  # noqa: E402
from benchmarks._record import RESULTS  # noqa: E402
from benchmarks.report import load_results  # noqa: E402


@pytest.fixture
def result():
    return copy.deepcopy(load_results(RESULTS, "clip_and_noise")[0])


def _column(found, words):
    (column,) = [each for each in found if each.column == words]
    return column


def test_a_run_agrees_with_itself(result):
    assert agreement.compare(result, result) == []


def test_a_figure_that_moved_counts_where_the_spread_is_smaller(result):
    rows = result["rows"] = result["rows"][:3]
    for row in rows:
        row["seconds"]["dpfast"]["spread"] = 0.05
        row["ratios"]["share_of_bandwidth"]["median_of_rounds"] = 0.5
    other = copy.deepcopy(result)
    for row, share in zip(other["rows"], (0.5, 0.52, 0.6), strict=True):
        row["ratios"]["share_of_bandwidth"]["median_of_rounds"] = share
    found = _column(agreement.compare(result, other), "share of bandwidth")
    assert found.moved == pytest.approx([0, 0.02 / 0.51, 0.1 / 0.55])
    assert found.within == 2
    other["rows"][2]["seconds"]["dpfast"]["spread"] = 0.2
    assert _column(agreement.compare(result, other), "share of bandwidth").within == 3


def test_other_rows_are_an_error(result):
    other = copy.deepcopy(result)
    other["rows"] = other["rows"][:-1]
    with pytest.raises(ValueError, match="the same op with the same rows"):
        agreement.compare(result, other)


@pytest.mark.parametrize(
    ("cell", "other", "moved"),
    [
        ("1.00x", "1.50x (missed)", 0.4),
        ("20.0 %", "20.0 %", 0.0),
        ("12 MiB", "12.0 ms", None),
        ("not measured", "1.00x", None),
        ("16x1x128x128", "16x1x128x128", None),
    ],
)
def test_cells_are_figures_of_one_unit_or_left_out(cell, other, moved):
    assert agreement._moved(cell, other) == (None if moved is None else pytest.approx(moved))


def test_command_line_compares_folders(tmp_path, result, capsys):
    other = copy.deepcopy(result)
    other["rows"][0]["ratios"]["share_of_bandwidth"]["median_of_rounds"] *= 1.5
    for name, each in (("a", result), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip_and_noise.json").write_text(json.dumps(each))
    assert agreement.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "share of bandwidth" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        agreement.main([str(tmp_path), str(tmp_path / "b")])
    assert "no op has results in both" in capsys.readouterr().err
