import json
import math

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord

from dpfast.federated.flower.arrays import to_arrays, to_weights
from dpfast.federated.flower.in_process import InProcessGrid
from dpfast.federated.flower.messages import evaluation, weighted
from dpfast.federated.rounds import MissingSitesError, Policy, Rounds
from dpfast.federated.run_folder import FederatedFolder
from dpfast.federated.strategies import (
    STRATEGIES,
    PrivateSites,
    RunningMean,
    begins_with_a_mean,
    make_strategy,
)
from dpfast.federated.weights import digest, problem_with, weights_of
from dpfast.privacy import PrivacyLedger
from dpfast.segmentation.models import build_model
from dpfast.segmentation.phantoms import phantom_task

from .sites import make_site, settings, write

NAMES = ("A", "B", "C")
PLAIN = dict.fromkeys(("noise_multiplier", "target_delta", "max_grad_norm"))


class Quiet:
    def __init__(self):
        self.lines = []

    def started(self, sites, rounds_done, rounds):
        self.began = (list(sites), rounds_done, rounds)

    def heard(self, round_number, site, status):
        pass

    def finished_round(self, line):
        self.lines.append(line)


@pytest.fixture(scope="module")
def weights():
    model = build_model("unet", phantom_task(2), {"channels": [4, 8], "strides": [2]})
    return weights_of(model)


def make_sites(path, names=NAMES, **changes):
    return {
        name: make_site(path, name, number=number, **changes) for number, name in enumerate(names)
    }


def make_rounds(path, sites, weights, *, strategy=None, rounds=2, min_sites=None, **policy):
    path.mkdir(parents=True, exist_ok=True)
    folder = FederatedFolder(settings(path))
    folder.start(write(path))
    grid = InProcessGrid(sites)
    return Rounds(
        grid,
        grid.nodes,
        strategy or make_strategy("fedavg", num_sites=len(sites)),
        Policy(rounds, min_sites or len(sites), policy.pop("site_weights", {}), **policy),
        weights,
        folder,
    )


def lines_of(path):
    return [json.loads(line) for line in (path / "run" / "rounds.jsonl").read_text().splitlines()]


class Stub:
    """A site that says what it is told to."""

    def __init__(self, name, answer):
        self.name, self._answer = name, answer

    def train(self, number, weights):
        from dpfast.federated import Update

        found = self._answer(number, weights)
        return Update(
            found.get("site", self.name),
            found.get("round", number),
            found.get("given", digest(weights)),
            found["weights"],
            {"epsilon": found.get("epsilon", 1.0), "steps": 1, "max_grad_norm": None},
        )

    def evaluate(self, weights):
        return {"dice": [0.5, None], "hausdorff95": [3.0, None]}


def moved(by):
    return lambda number, weights: {"weights": {k: v + np.float32(by) for k, v in weights.items()}}


def test_sites_weigh_the_same_whatever_their_size(tmp_path, weights):
    sites = {name: Stub(name, moved(by)) for name, by in zip(NAMES, (0.0, 3.0, 6.0), strict=True)}
    rounds = make_rounds(tmp_path, sites, weights, rounds=1)
    rounds.run(Quiet())
    for name, before in weights.items():
        np.testing.assert_allclose(rounds.weights[name], before + 3.0, rtol=1e-6)
        assert rounds.weights[name].dtype == before.dtype


def test_public_weights_are_the_servers(tmp_path, weights):
    sites = {name: Stub(name, moved(by)) for name, by in zip(NAMES, (0.0, 4.0, 8.0), strict=True)}
    rounds = make_rounds(tmp_path, sites, weights, rounds=1, site_weights={"C": 2.0})
    rounds.run(Quiet())
    for name, before in weights.items():
        np.testing.assert_allclose(rounds.weights[name], before + 5.0, rtol=1e-6)


def bad_answers(weights):
    first = next(iter(weights))
    whole = moved(1.0)
    nan = {**weights, first: weights[first] * np.nan}
    return {
        "not finite": lambda n, w: {"weights": nan},
        "is missing": lambda n, w: {"weights": {k: v for k, v in w.items() if k != first}},
        "is unknown": lambda n, w: {"weights": {**w, "more": w[first]}},
        "of shape": lambda n, w: {"weights": {**w, first: w[first][:1]}},
        "is int64": lambda n, w: {"weights": {**w, first: w[first].astype(np.int64)}},
        "another site's name": lambda n, w: {**whole(n, w), "site": "A"},
        "another request": lambda n, w: {**whole(n, w), "round": n + 1},
    }


@pytest.mark.parametrize(
    "reason",
    [
        *("not finite", "is missing", "is unknown", "of shape", "is int64"),
        *("another site's name", "another request"),
    ],
)
def test_an_answer_that_is_none_is_left_out_and_said_so(tmp_path, weights, reason):
    sites = {"A": Stub("A", moved(1.0)), "B": Stub("B", moved(3.0))}
    sites["C"] = Stub("C", bad_answers(weights)[reason])
    rounds = make_rounds(tmp_path, sites, weights, rounds=1, min_sites=2)
    rounds.run(Quiet())
    for name, before in weights.items():
        np.testing.assert_allclose(rounds.weights[name], before + 2.0, rtol=1e-6)
    told = lines_of(tmp_path)[0]["sites"]["C"]
    assert told["status"] == "failed"
    assert reason in told["reason"]


def test_too_few_sites_stop_the_run_and_lose_nothing(tmp_path, weights, caplog):
    broken = True

    def breaks(number, given):
        if number == 2 and broken:
            raise OSError("no space left")
        return moved(1.0)(number, given)

    sites = {"A": Stub("A", moved(1.0)), "B": Stub("B", breaks)}
    rounds = make_rounds(tmp_path, sites, weights)
    with pytest.raises(MissingSitesError, match=r"round 2 must have 2 sites.*B: OSError"):
        rounds.run(Quiet())
    # What it was stays at the site.
    assert "no space left" in caplog.text
    assert [line["round"] for line in lines_of(tmp_path)] == [1]
    broken = False
    observer = Quiet()
    rounds = make_rounds(tmp_path, sites, weights)
    rounds.run(observer)
    assert observer.began == (["A", "B"], 1, 2)
    for name, before in weights.items():
        np.testing.assert_allclose(rounds.weights[name], before + 2.0, rtol=1e-6)


def test_a_refusal_is_no_failure_of_the_run(tmp_path, weights):
    privacy = {"noise_multiplier": None, "target_epsilon": 3.0}
    sites = make_sites(tmp_path, ("A", "B"), seed=None)
    sites["C"] = make_site(
        tmp_path, "C", number=2, seed=None, privacy=privacy, federation={"rounds": 1}
    )
    rounds = make_rounds(tmp_path, sites, weights, min_sites=2)
    rounds.run(Quiet())
    first, second = lines_of(tmp_path)
    assert first["sites"]["C"]["status"] == "trained"
    assert second["sites"]["C"]["status"] == "refused"
    assert "budget of C" in second["sites"]["C"]["reason"]


def test_epsilon_is_the_largest_of_the_sites(tmp_path, weights):
    sites = make_sites(tmp_path, ("A", "B"), seed=None)
    sites["C"] = make_site(tmp_path, "C", number=2, seed=None, privacy={"noise_multiplier": 0.7})
    rounds = make_rounds(tmp_path, sites, weights, rounds=1)
    rounds.run(Quiet())
    (line,) = lines_of(tmp_path)
    found = {name: each["epsilon"] for name, each in line["sites"].items()}
    ledgers = {
        name: PrivacyLedger.read(tmp_path / "sites" / name / "ledger.jsonl").epsilon(1e-3)
        for name in NAMES
    }
    assert found == ledgers
    assert line["epsilon"] == found["C"] > found["A"]
    held = json.loads((tmp_path / "run" / "ledgers" / "sites.json").read_text())
    assert {name: each["epsilon"] for name, each in held.items()} == found


def test_a_run_that_is_cut_off_ends_with_the_same_weights(tmp_path, weights):
    whole = make_rounds(tmp_path / "whole", make_sites(tmp_path / "whole"), weights, rounds=3)
    whole.run(Quiet())
    for rounds in (1, 2, 3):
        sites = make_sites(tmp_path / "parts")
        parts = make_rounds(tmp_path / "parts", sites, weights, rounds=rounds)
        parts.run(Quiet())
        for site in sites.values():
            site.close()
    assert digest(parts.weights) == digest(whole.weights)
    lines = [lines_of(tmp_path / each) for each in ("whole", "parts")]
    for each in (*lines[0], *lines[1]):
        each.pop("seconds")
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_runs_and_goes_on_from_its_checkpoint(tmp_path, weights, name):
    names = [f"s{number}" for number in range(7)]
    arguments = {
        "krum": {"num_malicious_nodes": 1},
        "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
        "bulyan": {"num_malicious_nodes": 1},
        "fedavgm": {"server_momentum": 0.9},
        "fedprox": {"proximal_mu": 0.1},
    }.get(name)
    rng = np.random.default_rng(0)
    steps = {each: rng.normal(size=2).astype(np.float32) for each in names}

    def run(path, rounds):
        sites = {
            each: Stub(each, lambda n, w, each=each: moved(steps[each][n % 2])(n, w))
            for each in names
        }
        strategy = make_strategy(name, arguments, num_sites=len(sites))
        made = make_rounds(path, sites, weights, strategy=strategy, rounds=rounds)
        made.run(Quiet())
        return made.weights

    whole = run(tmp_path / "whole", 4)
    assert problem_with(whole, weights) is None
    assert digest(whole) != digest(weights)
    run(tmp_path / "parts", 2)
    assert digest(run(tmp_path / "parts", 4)) == digest(whole)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("average", None, "name must be one of"),
        ("fedadam", {"et": 1.0}, "arguments of fedadam must be of beta_1, beta_2, eta"),
        ("fedavg", {"fraction_train": 0.5}, "arguments of fedavg must be of none"),
        ("fedtrimmedavg", {"beta": 0.7}, "arguments of fedtrimmedavg"),
    ],
)
def test_wrong_strategies_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_strategy(name, arguments, num_sites=3)


class TestPrivateSites:
    def rounds(self, path, sites, weights, **changes):
        arguments = {"max_update_norm": 1.0, "noise_multiplier": 1.0, "sample_rate": 1.0, **changes}
        ledger = PrivacyLedger()
        nodes = InProcessGrid(sites).nodes
        strategy = PrivateSites(nodes, ledger=ledger, **arguments)
        return make_rounds(path, sites, weights, strategy=strategy, rounds=1, min_sites=1), ledger

    def test_a_site_moves_the_sum_by_its_bound_at_most(self, tmp_path, weights):
        for by in (1e-3, 1e3):
            sites = {name: Stub(name, moved(0.0)) for name in NAMES}
            sites["C"] = Stub("C", moved(by))
            rounds, _ = self.rounds(tmp_path / str(by), sites, weights, noise_multiplier=0.0)
            rounds.run(Quiet())
            change = [(rounds.weights[k] - v).ravel() for k, v in weights.items()]
            total = sum(each.size for each in change)
            norm = float(np.linalg.norm(np.concatenate(change).astype(np.float64)))
            wanted = min(1.0, by * math.sqrt(total)) / len(NAMES)
            assert norm == pytest.approx(wanted, rel=1e-3)

    @pytest.mark.statistical
    def test_noise_has_its_scale(self, tmp_path, weights):
        sites = {name: Stub(name, moved(0.0)) for name in NAMES}
        rounds, _ = self.rounds(
            tmp_path, sites, weights, noise_multiplier=2.0, max_update_norm=0.5, sample_rate=0.9
        )
        rounds.run(Quiet())
        change = np.concatenate([(rounds.weights[k] - v).ravel() for k, v in weights.items()])
        wanted = 2.0 * 0.5 / (0.9 * len(NAMES))
        # Of 556 numbers: 6 standard errors of the scale are 18 %.
        assert change.size > 500
        assert 0.82 * wanted < change.std() < 1.18 * wanted

    def test_the_server_counts_the_round_and_says_whom_it_protects(self, tmp_path, weights):
        import dp_accounting

        sites = {name: Stub(name, moved(0.1)) for name in NAMES}
        rounds, ledger = self.rounds(tmp_path, sites, weights, sample_rate=0.5)
        rounds.run(Quiet())
        gaussian = dp_accounting.GaussianDpEvent(1.0)
        assert ledger.spent() == [(dp_accounting.PoissonSampledDpEvent(0.5, gaussian), 1)]
        assert ledger.privacy_unit == "site"

    def test_a_round_without_any_site_is_noise_alone(self, tmp_path, weights):
        sites = {name: Stub(name, moved(1.0)) for name in NAMES}
        rounds, ledger = self.rounds(tmp_path, sites, weights, sample_rate=1e-9)
        rounds.run(Quiet())
        assert digest(rounds.weights) != digest(weights)
        assert ledger.spending(0).steps == 1
        assert lines_of(tmp_path)[0]["sites"]["A"]["status"] == "not asked"

    def test_a_seed_voids_the_guarantee(self, tmp_path, weights):
        sites = {name: Stub(name, moved(0.1)) for name in NAMES}
        rounds, ledger = self.rounds(tmp_path, sites, weights, seed=1)
        rounds.run(Quiet())
        assert math.isinf(ledger.epsilon(1e-3))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_mean_of_replies_stands_for_all_of_them_where_that_is_claimed(name):
    rng = np.random.default_rng(0)
    given = {"w": rng.normal(size=(3, 4)).astype(np.float32)}
    updates = [{"w": rng.normal(size=(3, 4)).astype(np.float32)} for _ in range(8)]
    shares = [1.0, 2.0, 1.0, 0.5, 1.0, 3.0, 1.0, 1.0]
    grid = InProcessGrid(dict.fromkeys("ABCDEFGH"))
    template = evaluation(to_arrays(given), 1, [2])[0]

    def joined(replies):
        strategy = make_strategy(name, num_sites=8)
        list(strategy.configure_train(1, to_arrays(given), ConfigRecord(), grid))
        result, _ = strategy.aggregate_train(1, replies)
        return strategy, to_weights(result)["w"]

    strategy, wanted = joined(
        [weighted(template, update, share) for update, share in zip(updates, shares, strict=True)]
    )
    if not begins_with_a_mean(strategy):
        assert name in {"fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"}
        return
    mean = RunningMean()
    for update, share in zip(updates, shares, strict=True):
        mean.add(update, share)
    _, found = joined([weighted(template, *mean.result())])
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
