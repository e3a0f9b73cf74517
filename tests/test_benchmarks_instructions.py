"""The count of instructions: what is compared, and what is written."""

import json
import stat

import pytest

from tests import benchmark_modules

benchmark_modules.load()

from benchmarks import instructions  # noqa: E402


def test_only_what_has_grown_by_more_than_five_percent_is_wrong():
    saved = {"a": 10.0, "b": 10.0, "c": 10.0}
    assert instructions.grown(saved, {"a": 10.49, "b": 7.0, "c": 10.0}) == {}
    assert instructions.grown(saved, {"a": 10.51, "b": 10.0, "c": 10.0}) == {"a": "+5.1%"}


def test_new_and_lost_cases_are_wrong():
    wrong = instructions.grown({"old": 1.0}, {"new": 1.0})
    assert wrong == {"new": "not saved yet", "old": "saved, but no longer counted"}


def test_the_page_has_every_saved_case():
    saved = json.loads(instructions.SAVED.read_text())
    assert instructions.PAGE.read_text() == instructions.render(saved)
    assert saved["cases"]


@pytest.fixture
def program(tmp_path):
    """A program that says that its only case has 10 elements, built by a compiler named here."""
    file = tmp_path / "count"
    file.write_text(
        '#!/bin/sh\nif [ "$1" = --compiler ]; then echo 1.2; '
        "elif [ $# = 0 ]; then echo case; else echo 10; fi\n"
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@pytest.fixture
def valgrind(tmp_path, monkeypatch):
    """A valgrind that counts 100 instructions and 25 a repeat, its last argument."""
    file = tmp_path / "bin" / "valgrind"
    file.parent.mkdir()
    file.write_text('#!/bin/sh\necho 10\necho "==1== Collected : $((100 + 25 * $5))" >&2\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{file.parent}:/bin:/usr/bin")
    return file


def test_what_comes_before_and_after_the_kernel_is_not_counted(program, valgrind):
    assert instructions.Counter(program).per_element("case") == 2.5


def test_the_check_fails_where_a_count_has_grown(program, valgrind, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "instructions.json"
    monkeypatch.setattr(instructions, "SAVED", saved)
    monkeypatch.setattr(instructions, "PAGE", tmp_path / "page.md")
    assert instructions.main(["--executable", str(program)]) == 0
    assert json.loads(saved.read_text())["cases"] == {"case": 2.5}
    check = ["--executable", str(program), "--check"]
    assert instructions.main(check) == 0
    saved.write_text(saved.read_text().replace("2.5", "2.3"))
    assert instructions.main(check) == 1
    assert "case: +8.7%" in capsys.readouterr().out
    saved.write_text(saved.read_text().replace("1.2", "3.4"))
    assert instructions.main(check) == 0
    assert "not compared" in capsys.readouterr().out
