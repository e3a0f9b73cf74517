"""What is generated: README's table, pictures, and the docs' tables are those of the results."""

import copy

import pytest

from tests import benchmark_modules

pytest.importorskip("monai")
pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")
benchmark_modules.load()

from benchmarks import _figures, _readme, large_federation, report  # noqa: E402
from benchmarks._ops import OPS  # noqa: E402
from benchmarks._record import RESULTS, ROOT  # noqa: E402


@pytest.fixture(scope="module")
def steps():
    return report.load_results(RESULTS, "step")


def test_the_docs_are_those_of_the_saved_results():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.render(RESULTS)


@pytest.fixture(scope="module")
def memories():
    return report.load_results(RESULTS, "memory")


def test_readme_is_that_of_the_saved_results(steps, memories):
    readme = (ROOT / "README.md").read_text()
    assert _readme.replace_table(readme, steps, memories) == readme


def test_readme_tells_who_fails_and_what_nobody_measured(steps, memories):
    result, memory = copy.deepcopy(steps[0]), copy.deepcopy(memories[0])
    row, memory_row = result["rows"][0], memory["rows"][0]
    assert row["case"]["network"] == memory_row["case"]["network"] == "UNet 2D"
    row["time_over_ordinary"]["dpfast"]["median_of_rounds"] = 0.5
    row["not_measured"]["opacus_hooks"] = "RuntimeError: no"
    del row["time_over_ordinary"]["opacus_hooks"]
    del memory_row["memory_over_ordinary"]["opacus_hooks"]
    del memory_row["memory_over_ordinary"]["dpfast"]
    text = f"before\n{_readme.BEGIN}\nold\n{_readme.END}\nafter"
    text = _readme.replace_table(text, [result], [memory])
    assert text.startswith("before\n")
    assert text.endswith("after")
    assert "old" not in text
    (line,) = [each for each in text.splitlines() if "UNet 2D" in each]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "0.50x"
    assert cells[3] == cells[6] == "fails"
    assert cells[4] == "not measured"


def test_readme_without_its_marks_or_its_results_is_an_error(steps, memories):
    with pytest.raises(ValueError, match="must hold"):
        _readme.replace_table("nothing", steps, memories)
    with pytest.raises(ValueError, match="must hold"):
        _readme.replace_table(f"{_readme.BEGIN}\n{_readme.END}", steps, [])


def test_pictures_are_drawn_of_every_device(tmp_path, steps, memories):
    found = [result for op in OPS for result in report.load_results(RESULTS, op)]
    slugs = {result["machine"]["device_slug"] for result in found}
    for slug in slugs:
        own = [result for result in found if result["machine"]["device_slug"] == slug]
        _figures.draw_roofline(own, tmp_path / f"{slug}.png")
        assert (tmp_path / f"{slug}.png").stat().st_size > 10_000
        assert (ROOT / "docs" / "figures" / f"roofline-{slug}.png").is_file()
    _figures.draw_steps(steps[0], memories[0], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 10_000


def test_a_device_with_one_kernel_has_one_panel(tmp_path):
    _figures.draw_roofline(report.load_results(RESULTS, "morphology"), tmp_path / "one.png")
    assert (tmp_path / "one.png").is_file()


def test_report_writes_readme_docs_and_pictures(tmp_path):
    (tmp_path / "docs").mkdir()
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    report.write(RESULTS, tmp_path)
    assert (tmp_path / "README.md").read_text() == readme
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == report.render(RESULTS)
    assert list((tmp_path / "docs" / "figures").glob("steps-*.png"))


def test_large_federation_counts_what_it_says():
    parameters, forward = large_federation._count()
    assert parameters == pytest.approx(31.2e6, rel=0.01)
    assert forward == pytest.approx(0.95e12, rel=0.02)
    text = large_federation.render(10**6, 10**12, {"unpack": 0.5, "digest, once a round": 1.0}, "m")
    assert "| weights | 4.0 MB |" in text
    assert "| all replies of a round | 500.0 s |" in text
    assert "| in and out of the server, each round | 8.0 GB |" in text
    # sqrt(10^6) z / B, and over sqrt(1,000) more in the mean of the sites
    assert "| 1.0 | 4.20 | 500 | 16 |" in text
