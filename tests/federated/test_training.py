import json

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from dpfast.federated.training import federate
from dpfast.privacy import PrivacyLedger

from .sites import settings, write

PLAIN = dict.fromkeys(("noise_multiplier", "target_delta", "max_grad_norm"))


class Watch:
    def __init__(self, stop_after=None):
        self.stop_after, self.lines, self.replies = stop_after, [], []

    def started(self, sites, rounds_done, rounds):
        self.sites, self.rounds_done = list(sites), rounds_done

    def heard(self, round_number, site, status):
        self.replies.append((round_number, site, status))

    def finished_round(self, line):
        self.lines.append(line)
        if line["round"] == self.stop_after:
            raise KeyboardInterrupt


def run(path, **changes):
    return federate(write(path, **changes), Watch())


def test_a_run_leaves_what_people_look_at(tmp_path):
    report = run(tmp_path)
    folder = tmp_path / "run"
    assert report == json.loads((folder / "report.json").read_text())
    assert report["run"]["method"] == "dp_fl"
    assert report["privacy"]["guarantee"] == "(epsilon, delta)"
    assert set(report["sites"]) == {"site 1", "site 2", "site 3"}
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[-1]["epsilon"] == report["privacy"]["epsilon"]
    spent = [
        PrivacyLedger.read(folder / "sites" / name / "ledger.jsonl").epsilon(1e-3)
        for name in report["sites"]
    ]
    assert report["privacy"]["epsilon"] == max(spent) > 0.0
    assert torch.load(folder / "model.pt", weights_only=True).keys()
    examples = np.load(folder / "examples.npz")
    assert list(examples["sites"]) == list(report["sites"])
    assert examples["image_0"].shape == examples["prediction_2"].shape == (64, 64)


def test_a_finished_run_is_not_trained_again(tmp_path):
    report = run(tmp_path)
    watch = Watch()
    assert federate(tmp_path / "federation.toml", watch) == report
    assert watch.lines == []


def test_a_run_that_was_stopped_goes_on_with_its_ledgers_right(tmp_path):
    file = write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        federate(file, Watch(stop_after=2))
    watch = Watch()
    report = federate(file, watch)
    assert watch.rounds_done == 2
    assert watch.replies == [(3, f"site {number}", "trained") for number in (1, 2, 3)]
    assert [line["round"] for line in watch.lines] == [3]
    whole = run(tmp_path / "whole")
    assert report["privacy"] == whole["privacy"]
    for name in report["sites"]:
        held = [
            PrivacyLedger.read(path / "run" / "sites" / name / "ledger.jsonl").spending(0).steps
            for path in (tmp_path, tmp_path / "whole")
        ]
        assert held[0] == held[1]


def test_a_seed_makes_runs_equal_and_voids_the_guarantee(tmp_path):
    reports = [run(tmp_path / each, federation={"seed": 3}) for each in ("a", "b")]
    assert reports[0] == reports[1]
    assert reports[0]["privacy"]["guarantee"] == "none"
    assert "seed" in reports[0]["privacy"]["reasons"][0]
    models = [
        torch.load(tmp_path / each / "run" / "model.pt", weights_only=True) for each in ("a", "b")
    ]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name])


@pytest.mark.parametrize(
    ("changes", "method", "guarantee"),
    [
        ({"privacy": {"private": False, **PLAIN}}, "non_private", "none"),
        ({"privacy": {"threshold": {"kind": "private_quantile"}}}, "adp_fl", "(epsilon, delta)"),
        (
            {
                "privacy": {
                    "max_grad_norm": None,
                    "mechanism": "laplace",
                    "threshold": {"kind": "percentile_paper"},
                }
            },
            "adp_fl_paper",
            "none",
        ),
        (
            {
                "privacy": {"private": False, **PLAIN},
                "site_privacy": {
                    "max_update_norm": 1.0,
                    "noise_multiplier": 1.0,
                    "target_delta": 0.1,
                },
            },
            "dp_fedavg",
            "(epsilon, delta)",
        ),
    ],
)
def test_every_method_says_what_it_promises(tmp_path, changes, method, guarantee):
    report = run(tmp_path, federation={"rounds": 1}, **changes)
    assert (report["run"]["method"], report["privacy"]["guarantee"]) == (method, guarantee)
    assert (report["privacy"]["epsilon"] == "infinite") == (guarantee == "none")
    assert report["privacy"]["privacy_unit"] == ("site" if method == "dp_fedavg" else "sample")
    if guarantee == "none":
        assert report["privacy"]["reasons"]


def test_adaptive_thresholds_go_on_from_round_to_round(tmp_path):
    run(tmp_path, privacy={"threshold": {"kind": "private_quantile"}, "max_grad_norm": 10.0})
    lines = [json.loads(x) for x in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    bounds = [line["sites"]["site 1"]["max_grad_norm"] for line in lines]
    # The norms are far below 10, so each round lowers the threshold further.
    assert 10.0 > bounds[0] > bounds[1] > bounds[2]


def test_adaptive_morphology_is_measured_once_at_each_site(tmp_path):
    privacy = {"privacy_unit": "patient"}
    morphology = {"kind": "adaptive", "noise_multiplier": 5.0}
    run(tmp_path, privacy=privacy, morphology=morphology)
    for number in (1, 2, 3):
        ledger = PrivacyLedger.read(tmp_path / f"run/sites/site {number}/ledger.jsonl")
        measured = [
            spent.steps
            for each, spent in zip(
                ledger.mechanisms,
                [ledger.spending(i) for i in range(len(ledger.mechanisms))],
                strict=True,
            )
            if "sample_rate" not in json.dumps(each.description)
        ]
        assert measured == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": {"round": 3}}, "federation.round: there is no such setting"),
        ({"federation": {"rounds": 0}}, "federation.rounds"),
        ({"federation": {"strategy": "fedprox"}}, "proximal_mu > 0"),
        ({"federation": {"strategy": "median"}}, "federation.strategy"),
        ({"sites": {"kind": "natural", "number": None}}, "sites.columns: must be given"),
        ({"sites": {"number": 1}}, "sites.number"),
        ({"training": {"epochs": 3}}, "training.epochs: there is no such setting"),
        ({"training": {"momentum": 0.9}}, "momentum has no effect"),
        ({"privacy": {"target_delta": None}}, "target_delta must be given"),
        (
            {"site_privacy": {"max_update_norm": 1, "noise_multiplier": 1, "target_delta": 0.1}},
            "site_privacy needs privacy.private = false",
        ),
        ({"morphology": {"kind": "adaptive", "noise_multiplier": 1.0}}, "privacy_unit 'patient'"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        settings(tmp_path, **changes)


def test_errors_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="site_weights must name sites"):
        run(tmp_path / "a", federation={"site_weights": {"site 9": 1.0}})
    with pytest.raises(ValueError, match=r"target_delta must be < 1 / \d+"):
        run(tmp_path / "b", privacy={"target_delta": 0.2})
    with pytest.raises(ValueError, match=r"expected_batch_size must be <= \d+"):
        run(tmp_path / "c", privacy={"expected_batch_size": 500})
    for each in "abc":
        assert not list((tmp_path / each / "run").glob("rounds.jsonl"))


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
    run(tmp_path, federation={"rounds": 1})
    held = sorted(p.read_bytes() for p in (tmp_path / "run").glob("*.*"))
    with pytest.raises(ValueError, match=r"where federation\.rounds is 1 and not 2"):
        run(tmp_path, federation={"rounds": 2})
    assert sorted(p.read_bytes() for p in (tmp_path / "run").glob("*.*")) == held
    other = tmp_path / "other"
    (other / "run").mkdir(parents=True)
    (other / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        run(other)


@pytest.mark.slow
def test_the_demonstration_learns(tmp_path):
    from dpfast.federated.demo import METHODS, demonstrate

    reports = demonstrate(tmp_path, lambda name: Watch())
    assert list(reports) == list(METHODS)
    assert "ADP-FL" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for report in reports.values():
        assert report["results"]["scores"]["dice"][0] > 0.8
