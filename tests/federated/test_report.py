"""The report: what runs it puts together, what it shows, and that it needs nothing but itself."""

import html.parser
import json
import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr")
pytest.importorskip("jinja2")

from dpfast.cli.app import app
from dpfast.federated.report import write_report
from dpfast.federated.report.runs import Spread, group_runs, load_run
from dpfast.federated.training import federate

from .sites import write
from .test_training import PLAIN, Watch

LOOK = {"data": {"look": "retina", "patients": 45, "sites": 3}}
NATURAL = {"kind": "natural", "number": None, "columns": ["site"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two repetitions of a private run of many classes, and one without privacy."""
    root = tmp_path_factory.mktemp("runs")
    changes = {
        "a": {"model": {"weights_seed": 0}},
        "b": {"model": {"weights_seed": 1}},
        "c": {"privacy": {"private": False, **PLAIN}},
    }
    for name, change in changes.items():
        federate(
            write(root / name, **LOOK, sites=NATURAL, federation={"rounds": 2}, **change), Watch()
        )
    return [root / name / "run" for name in changes]


class Page(html.parser.HTMLParser):
    """Tags, links and texts of a page, closed as they were opened."""

    EMPTY = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.sources.append(value)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_repetitions_are_put_together(runs):
    groups = group_runs([load_run(path) for path in runs])
    assert [group.label for group in groups] == [
        "DP-FL, fixed threshold, noise 1, flat",
        "non-private",
    ]
    assert [len(group.runs) for group in groups] == [2, 1]
    scores = [json.loads((path / "report.json").read_text())["results"] for path in runs[:2]]
    dice = [[x for x in each["scores"]["dice"] if x is not None] for each in scores]
    means = [sum(each) / len(each) for each in dice]
    spread = groups[0].score("dice")
    assert spread.mean == pytest.approx(sum(means) / 2)
    assert spread.deviation == pytest.approx(abs(means[0] - means[1]) / 2**0.5)


def test_page_is_whole_and_needs_nothing_else(runs, tmp_path):
    write_report(runs, tmp_path / "out" / "page.html")
    text = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith(("data:image/", "#")) for source in page.sources)
    assert "script" not in page.tags
    assert not re.search(r"https?://", text.split("<style>")[0])
    assert '<meta name="viewport"' in text
    said = " ".join(page.text)
    for each in ("site 1", "site 3", "fluid", "ISE", "No guarantee", "Not covered", "ONL-ISM"):
        assert each in said
    assert str(tmp_path) not in said


def test_numbers_on_the_page_are_those_of_the_runs(runs, tmp_path):
    write_report(runs[:1], tmp_path / "page.html")
    said = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    report = json.loads((runs[0] / "report.json").read_text())
    dice = report["results"]["sites"]["site 2"]["dice"][0]
    assert f"{dice:.3f}" in said
    epsilon = report["privacy"]["epsilon"]
    assert (f"{epsilon:.2f}" if epsilon >= 2 else f"{epsilon:.3f}") in said


def test_names_cannot_become_markup(runs, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    for name in ("report.json", "rounds.jsonl"):
        file = copy / name
        file.write_text(file.read_text().replace("site 1", "<b>x</b>"))
    write_report([copy], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert "<b>x</b>" in page.text


def test_updates_that_were_not_used_are_listed(runs, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    lines = [json.loads(line) for line in (copy / "rounds.jsonl").read_text().splitlines()]
    lines[1]["sites"]["site 2"] |= {"status": "refused", "reason": "nothing is left"}
    (copy / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_report([copy], tmp_path / "page.html")
    said = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "Updates that were not used" in said
    assert "nothing is left" in said


def test_folders_that_are_no_finished_runs_are_refused(runs, tmp_path):
    done = CliRunner().invoke(
        app, ["report", str(tmp_path), "--output", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 2
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match="got one twice"):
        group_runs([load_run(runs[0])] * 2)
    with pytest.raises(ValueError, match="must be the folder of a finished federated run"):
        load_run(tmp_path)


def test_command_writes_the_page(runs, tmp_path):
    done = CliRunner().invoke(
        app, ["report", *map(str, runs), "--output", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page.html").stat().st_size > 50_000


def test_spread_of_what_is_known():
    assert Spread.of([None, float("nan")]).count == 0
    one = Spread.of([0.5, None])
    assert (one.mean, one.count) == (0.5, 1)
    assert one.deviation != one.deviation
    two = Spread.of([1.0, 3.0])
    assert (two.mean, two.deviation) == (2.0, pytest.approx(2**0.5))
