"""`dpfast budget`: what it prints, and that misuse is an error with status 2."""

import json
import sys

import dp_accounting as dp
import pytest
from typer.testing import CliRunner

from dpfast import PrivacyEngine, PrivacyLedger
from dpfast.cli.app import app
from dpfast.privacy.accounting import TrainingStep, epsilon
from tests.privacy.helpers import loader_of, make, train, vectors

GIVEN = ["--num-units", "1000", "--expected-batch-size", "50", "--epochs", "5"]
RUN = [*GIVEN, "--noise-multiplier", "1.5", "--accountant", "rdp"]
STEP = TrainingStep(1.5, 0.05, 1000).event()
DELTA = 1e-4


def call(*arguments):
    wide = {"COLUMNS": "250"}
    return CliRunner().invoke(app, ["budget", *arguments], env=wide)


def shown(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(shown(*arguments, "--json"), parse_constant=refuse)


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("dpfast budget: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def rdp(events):
    return epsilon(events, DELTA, accountant="rdp")


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    made = PrivacyLedger(path)
    description = {"release": "training step", "sampling": "poisson", "num_units": 1000}
    step = made.register(STEP, privacy_unit="patient", description=description)
    made.record(step, steps=40, spends=40)
    return str(path)


def row(text, name):
    """The second cell of the row of a table that begins so."""
    rows = [line.split("│") for line in text.splitlines() if "│" in line]
    [found] = [cells[2].strip() for cells in rows if cells[1].strip() == name]
    return found


def test_noise_is_found_from_three_numbers_and_a_target():
    text = shown("--num-units", "60", "--expected-batch-size", "6", "--epochs", "2",
                 "--target-epsilon", "0.1")  # fmt: skip

    def spent(noise):
        return epsilon([(TrainingStep(noise, 0.1, 60).event(), 20)], 1 / 600)

    noise = float(row(text, "noise multiplier").split(",")[0])
    assert spent(noise) <= 0.1 < spent(noise - 2e-4)
    assert row(text, "epsilon").endswith("(target 0.1)")
    assert row(text, "accountant").startswith("PLD, dp-accounting ")
    assert "1 / (10 x 60 units), as none was given" in row(text, "delta")
    for share, steps in (("25 %", 5), ("50 %", 10), ("75 %", 15), ("100 %", 20)):
        assert row(text, share) == str(steps)


@pytest.mark.slow
def test_budget_of_a_common_size():
    text = shown("--num-units", "5000", "--expected-batch-size", "64", "--epochs", "30",
                 "--target-epsilon", "8")  # fmt: skip
    assert row(text, "noise multiplier").startswith("0.7101, gaussian")
    assert row(text, "steps") == "2370 = 30 epochs of 79"


def test_tables_state_what_epsilon_is_about():
    text = shown(*RUN, "--privacy-unit", "patient")
    assert row(text, "protects") == (
        "one patient, with all of its samples, added or removed (add_or_remove_one)"
    )
    assert "a patient with several samples has a larger epsilon" in row(shown(*RUN), "protects")
    assert row(text, "accountant").startswith("RDP, dp-accounting ")
    assert row(text, "sampler") == "poisson: each unit is in a step with chance 0.05"
    assert row(text, "expected batch size") == "50 of 1000 patients"
    assert "the guarantee is one of real arithmetic" in row(text, "guarantee")
    # Rounded up, never below what was computed.
    found = rdp([(STEP, 100)])
    assert found <= float(row(text, "epsilon")) < found * 1.001


def test_options_of_noise_and_sampler_are_shown():
    text = shown(*RUN, "--count-noise", "2", "--max-grad-norm", "0.4", "--release-noise", "5",
                 "--release-noise", "8", "--delta", "1e-5")  # fmt: skip
    threshold = row(text, "adaptive threshold")
    assert "count noise 2" in threshold
    assert "85.94 % of the budget is the gradient's, 14.06 % the threshold's" in threshold
    assert row(text, "noise").startswith("std 0.64723 on the sum of gradients clipped to 0.4")
    assert row(text, "other releases") == "Gaussian, noise multiplier 5, 8"
    assert row(text, "delta") == "1e-05 (as given)"

    text = shown(*RUN, "--histogram-noise", "8")
    assert "histogram noise 8" in row(text, "adaptive threshold")

    text = shown(*RUN, "--max-grad-norm", "3,4", "--group-noise-weights", "proportional")
    assert "std 6.364 on the sum of gradients clipped to 3" in row(text, "noise of group 1")
    assert "std 8.4853 on the sum of gradients clipped to 4" in row(text, "noise of group 2")
    assert row(text, "sensitivity") == "5 over all groups"
    text = shown(*RUN, "--max-grad-norm", "3,4", "--group-noise-weights", "1,2")
    assert "std 5.4083 on" in row(text, "noise of group 1")

    text = shown(*RUN, "--mechanism", "laplace", "--norm", "l2", "--dimension", "10000")
    assert "laplace noise after an L2 clip, accounted by its Gaussian-DP bound" in text
    assert row(text, "pure epsilon") == "66.67 per release, without delta"

    text = shown(*RUN, "--sampling", "shuffled_unamplified")
    assert "no amplification is counted" in row(text, "sampler")

    small = ("--num-units", "200", "--expected-batch-size", "20", "--steps", "2")
    text = shown(*small, "--noise-multiplier", "9", "--max-batch-size", "40")
    assert row(text, "max batch size") == "40; units beyond it are dropped"


def test_json_is_the_report():
    report = as_json(*RUN)
    assert report["epsilon"] == rdp([(STEP, 100)])
    assert report["privacy_unit"] == "sample"
    assert report["adjacency"] == "add_or_remove_one"
    target = ("--target-epsilon", "9", "--sampling", "shuffled_unamplified")  # quick to account
    found = as_json(*GIVEN, "--accountant", "rdp", *target)
    assert found["solved_for"] == "noise_multiplier"
    assert found["epsilon"] <= 9.0 == found["target_epsilon"]
    found = as_json(*RUN[:4], *RUN[6:], *target)
    assert found["solved_for"] == "steps"
    by_rate = as_json("--sample-rate", "0.05", "--steps", "100", *RUN[6:], "--delta", "1e-4")
    assert by_rate["epsilon"] == report["epsilon"]
    assert by_rate["num_units"] is None


# --- ledger ---


def test_ledger_shows_what_was_spent(ledger, tmp_path):
    before = (tmp_path / "ledger.jsonl").read_bytes()
    text = shown("--ledger", ledger, "--accountant", "rdp")
    assert "one patient, with all of its samples" in row(text, "protects")
    assert float(row(text, "epsilon")) == pytest.approx(rdp([(STEP, 40)]), rel=1e-3)
    assert "1 / (10 x 1000 units)" in row(text, "delta")
    assert "PoissonSampled(0.05, Gaussian(1.5))" in text
    assert row(text, "training step") == "poisson"
    report = as_json("--ledger", ledger, "--accountant", "rdp", "--delta", "1e-4")
    assert report["epsilon"] == rdp([(STEP, 40)])
    assert report["mechanisms"][0]["steps"] == 40
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_ledger_of_a_training_is_shown(tmp_path):
    path = tmp_path / "ledger.jsonl"
    data = loader_of(vectors(40), batch_size=8)
    engine, model, optimizer, loader = make(data, PrivacyEngine(ledger=path))
    train(model, optimizer, loader)
    text = shown("--ledger", str(path), "--accountant", "rdp")
    assert row(text, "training step") == "poisson"
    assert "PoissonSampled(0.2, Gaussian(1))" in text
    assert "1 / (10 x 40 units)" in row(text, "delta")
    assert engine.steps == 5


def test_ledger_and_a_further_run(ledger):
    more = ("--expected-batch-size", "50", "--epochs", "3", "--accountant", "rdp")
    report = as_json("--ledger", ledger, *more, "--noise-multiplier", "1.5")
    assert report["epsilon"] == pytest.approx(rdp([(STEP, 100)]))
    assert report["ledger"]["epsilon"] == rdp([(STEP, 40)])
    assert report["privacy_unit"] == "patient"
    assert report["num_units"] == 1000
    target = ("--target-epsilon", "9", "--sampling", "shuffled_unamplified")
    text = shown("--ledger", ledger, *more, *target)
    assert "in the ledger" in text
    assert " with the ledger's " in text
    assert "(target 9)" in text


def test_ledger_without_guarantee_says_so(tmp_path):
    path = tmp_path / "ledger.jsonl"
    made = PrivacyLedger(path)
    step = made.register(
        STEP, privacy_unit="sample", description={"num_units": 1000}, reasons=["seeded [noise]"]
    )
    made.record(step)
    del made
    text = shown("--ledger", str(path), "--accountant", "rdp")
    assert row(text, "epsilon") == "infinite"
    assert row(text, "no guarantee") == "seeded [noise]"
    assert row(text, "conditional epsilon").endswith("if that had not been so")
    report = as_json("--ledger", str(path), *RUN)
    assert report["epsilon"] is None
    assert "no guarantee: seeded" in refused(
        "--ledger", str(path), *GIVEN, "--target-epsilon", "4", "--accountant", "rdp"
    )
    plot = str(tmp_path / "epsilon.png")
    assert "epsilon is infinite" in refused("--ledger", str(path), *RUN, "--plot", plot)


# --- plot ---


@pytest.mark.parametrize("name", ["epsilon.png", "epsilon.svg"])
def test_plot_is_written(tmp_path, name):
    path = tmp_path / name
    report = as_json(*RUN, "--plot", str(path))
    assert report["steps"] == 100
    start = b"\x89PNG" if name.endswith("png") else b"<?xml"
    assert path.read_bytes().startswith(start)


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "epsilon.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "dpfast[plot]"' in refused(*RUN, "--plot", str(path))
    assert not path.exists()
    shown(*RUN)  # nothing else needs it


# --- misuse ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "num_units must be given"),
        (GIVEN, "noise_multiplier must be given; or give target_epsilon"),
        ((*RUN, "--target-epsilon", "3"), "exactly one of"),
        ((*RUN, "--delta", "0.001"), "delta must be < 1 / 1000"),
        ((*RUN, "--accountant", "prv"), "accountant must be one of pld, rdp"),
        ((*RUN, "--steps", "5"), "steps and epochs must not both be given"),
        ((*RUN, "--max-grad-norm", "1,x"), "max_grad_norm must be numbers with commas"),
        ((*RUN, "--max-grad-norm", "1,2", "--group-noise-weights", "1,"), "must be numbers with"),
        ((*RUN, "--mechanism", "laplace"), "accountant 'rdp' has no bound"),
        ((*RUN, "--plot", "epsilon.pdf"), "plot must be a .png or .svg file"),
        ((*RUN, "--plot", "no_such_folder/epsilon.png"), "plot must be in an existing folder"),
        (
            ("--num-units", "1000", "--expected-batch-size", "10", "--steps", str(2**53),
             "--noise-multiplier", "1"),
            "out of memory",
        ),
        (("--ledger", "no_such_ledger.jsonl"), "No such file"),
        ((*RUN, "--privacy-unit", "site"), "privacy_unit must be one of sample, patient"),
    ],
)  # fmt: skip
def test_misuse_is_an_error_with_status_2(arguments, message):
    assert message in refused(*arguments)


def test_misuse_of_a_ledger_is_an_error_with_status_2(ledger, tmp_path):
    # An option about a run asks for one; it is not dropped.
    assert "must be given" in refused("--ledger", ledger, "--mechanism", "laplace")
    assert "like the ledger's" in refused("--ledger", ledger, *RUN, "--privacy-unit", "sample")
    assert "delta must be < 1 / 1000" in refused("--ledger", ledger, "--delta", "0.5")
    assert "num_units must be >= 1" in refused("--ledger", ledger, "--num-units", "0")
    nameless = tmp_path / "nameless.jsonl"
    made = PrivacyLedger(nameless)
    made.record(made.register(dp.GaussianDpEvent(3.0), privacy_unit="site", description={}))
    del made
    assert "delta must be given" in refused("--ledger", str(nameless))
    assert "one site added or removed" in shown(
        "--ledger", str(nameless), "--delta", "1e-3", "--accountant", "rdp"
    )
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("{}\n")
    assert "line 1 of" in refused("--ledger", str(damaged))


def test_unknown_option_is_an_error_with_status_2():
    assert call(*RUN, "--noise-multipler", "2").exit_code == 2
