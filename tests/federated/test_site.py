import gc

import numpy as np
import pytest
import torch

from dpfast.federated import BudgetSpentError
from dpfast.federated.weights import digest, load_weights, problem_with, weights_of
from dpfast.privacy import PrivacyLedger
from dpfast.segmentation.models import build_model
from dpfast.segmentation.phantoms import phantom_task

from .sites import make_site

STEPS = 3  # of a round


@pytest.fixture(scope="module")
def weights():
    model = build_model("unet", phantom_task(2), {"channels": [4, 8], "strides": [2]})
    return weights_of(model)


def test_a_round_changes_the_weights_and_is_in_the_ledger_before(tmp_path, weights):
    site = make_site(tmp_path, seed=None)
    update = site.train(1, weights)
    assert (update.site, update.round, update.given) == ("A", 1, digest(weights))
    assert problem_with(update.weights, weights) is None
    assert digest(update.weights) != digest(weights)
    ledger = PrivacyLedger.read(tmp_path / "sites" / "A" / "ledger.jsonl")
    assert update.privacy["steps"] == ledger.spending(0).steps == STEPS
    assert update.privacy["epsilon"] == ledger.epsilon(1e-3) > 0
    assert update.privacy["guarantee"] == "(epsilon, delta)"


def test_a_round_leaves_no_model_behind(tmp_path, weights):
    """Whatever Python's collector does: a site's model is gone when it has answered."""
    site = make_site(tmp_path, model={"arguments": {"channels": [4, 8, 64], "strides": [2, 2]}})
    task = phantom_task(2)
    model = build_model("unet", task, {"channels": [4, 8, 64], "strides": [2, 2]})
    given, largest = weights_of(model), max(p.numel() for p in model.parameters())
    del model
    gc.collect()
    before = _large_tensors(largest)
    gc.disable()
    try:
        update = site.train(1, given)
        site.evaluate(update.weights)
        assert _large_tensors(largest) == before
    finally:
        gc.enable()


def _large_tensors(numel):
    # isinstance would ask objects that answer with warnings.
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum(each.numel() >= numel for each in found)


def test_rounds_go_on_as_if_they_were_one_run(tmp_path, weights):
    site = make_site(tmp_path)
    once = site.train(1, weights)
    twice = site.train(2, once.weights)
    assert (once.privacy["steps"], twice.privacy["steps"]) == (STEPS, 2 * STEPS)
    # Seeded alike, the second round has noise and batches of its own.
    other = make_site(tmp_path / "other", name="A")
    assert digest(other.train(1, weights).weights) == digest(once.weights)
    again = make_site(tmp_path / "third", name="A").train(1, once.weights)
    assert digest(again.weights) != digest(twice.weights)


def test_a_restarted_site_goes_on_with_the_same_bits(tmp_path, weights):
    site = make_site(tmp_path)
    first = site.train(1, weights)
    second = site.train(2, first.weights)
    site = make_site(tmp_path / "other")
    site.train(1, weights)
    site.close()
    restarted = make_site(tmp_path / "other")
    assert digest(restarted.train(2, first.weights).weights) == digest(second.weights)


def test_a_round_asked_for_again_costs_nothing_and_gives_the_same(tmp_path, weights):
    site = make_site(tmp_path, seed=None)
    first = site.train(1, weights)
    again = site.train(1, weights)
    assert digest(again.weights) == digest(first.weights)
    assert again.privacy == first.privacy
    site.close()
    restarted = make_site(tmp_path, seed=None).train(1, weights)
    assert digest(restarted.weights) == digest(first.weights)
    assert PrivacyLedger.read(tmp_path / "sites" / "A" / "ledger.jsonl").spending(0).steps == STEPS
    other = {name: each + 0.5 for name, each in weights.items()}
    site = make_site(tmp_path / "x", seed=None)
    site.train(1, weights)
    assert site.train(1, other).privacy["steps"] == 2 * STEPS


def test_steps_of_a_round_that_was_cut_off_stay_counted(tmp_path, weights, monkeypatch):
    site = make_site(tmp_path, seed=None)

    def lose(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(site._folder), "write_checkpoint", lose)
    with pytest.raises(OSError, match="disk"):
        site.train(1, weights)
    monkeypatch.undo()
    site.close()
    restarted = make_site(tmp_path, seed=None)
    assert restarted.train(1, weights).privacy["steps"] == 2 * STEPS


def test_a_site_refuses_a_round_that_its_budget_does_not_cover(tmp_path, weights):
    privacy = {"noise_multiplier": None, "target_epsilon": 3.0}
    site = make_site(tmp_path, seed=None, federation={"rounds": 2}, privacy=privacy)
    first = site.train(1, weights)
    second = site.train(2, first.weights)
    assert second.privacy["epsilon"] <= 3.0
    ledger = tmp_path / "sites" / "A" / "ledger.jsonl"
    before = ledger.read_bytes()
    with pytest.raises(BudgetSpentError, match="round 3 must be covered by the budget of A"):
        site.train(3, second.weights)
    assert ledger.read_bytes() == before


def test_without_privacy_there_is_no_ledger(tmp_path, weights):
    plain = dict.fromkeys(("noise_multiplier", "target_delta", "max_grad_norm"))
    site = make_site(tmp_path, privacy={"private": False, **plain})
    update = site.train(1, weights)
    assert update.privacy["guarantee"] == "none"
    assert update.privacy["epsilon"] == "infinite"
    assert not (tmp_path / "sites" / "A" / "ledger.jsonl").exists()


def test_the_proximal_term_pulls_towards_the_weights_of_the_round(tmp_path, weights):
    plain = dict.fromkeys(("noise_multiplier", "target_delta", "max_grad_norm"))
    moved = []
    for mu in (0.0, 30.0):
        training = {"optimizer": "sgd", "learning_rate": 0.05, "proximal_mu": mu, "local_epochs": 5}
        site = make_site(tmp_path / str(mu), training=training, privacy={"private": False, **plain})
        update = site.train(1, weights)
        moved.append(sum(float(((update.weights[k] - weights[k]) ** 2).sum()) for k in weights))
    assert 0.0 < moved[1] < 0.5 * moved[0]


def test_one_step_with_the_proximal_term_is_the_formula():
    from dpfast.federated.site import _pull

    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    _pull(optimizer, 0.5)
    for gradient, wanted in (([1.0, 0.0], [0.9, 2.0]), ([0.0, 0.0], [0.905, 2.0])):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.tensor(wanted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: dict(list(w.items())[1:]), "is missing"),
        (lambda w: {**w, "more": np.zeros(1, np.float32)}, "more is unknown"),
        (lambda w: {k: v[..., None] for k, v in w.items()}, "of shape"),
        (lambda w: {k: v.astype(np.float64) for k, v in w.items()}, "is float64"),
        (lambda w: {k: v * np.nan for k, v in w.items()}, "not finite"),
    ],
)
def test_weights_of_another_model_are_refused_before_anything_is_spent(
    tmp_path, weights, change, message
):
    site = make_site(tmp_path, seed=None)
    with pytest.raises(ValueError, match=message):
        site.train(1, change(weights))
    ledger = PrivacyLedger.read(tmp_path / "sites" / "A" / "ledger.jsonl")
    assert all(ledger.spending(i).steps == 0 for i in range(len(ledger.mechanisms)))


def test_scores_are_of_the_sites_own_patients(tmp_path, weights):
    site = make_site(tmp_path)
    scores = site.evaluate(weights)
    assert set(scores) == {"dice", "hausdorff95"}
    assert len(scores["dice"]) == 1
    assert 0.0 <= scores["dice"][0] <= 1.0
    assert site.evaluate(weights) == scores


def test_only_floating_point_travels():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).half()
    found = weights_of(model)
    assert "1.num_batches_tracked" not in found
    assert {each.dtype for each in found.values()} == {np.dtype(np.float32)}
    model[1].num_batches_tracked += 3
    load_weights(model, {name: each + 1 for name, each in found.items()})
    assert int(model[1].num_batches_tracked) == 3
    torch.testing.assert_close(model[1].running_mean, torch.ones(2).half())
    assert digest(found) != digest({name: each + 1 for name, each in found.items()})
