"""Two processes are one: same epsilon, same sums, noise once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpfast
from tests.privacy.helpers import loader_of, make, train, vectors

DELTA = 1e-5
WIDTH = 2000
ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
import torch
import dpfast  # before the repository, whose source folder would hide the installed package
sys.path.append(sys.argv[3])
from tests.privacy.test_data_parallel import run
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
for number, settings in enumerate(json.loads(sys.argv[1])):
    run(settings, os.path.join(sys.argv[2], f"{number}.{os.environ['RANK']}"))
torch.distributed.destroy_process_group()
"""
SEEDED = [
    {"seed": 5},
    {"seed": 5, "physical_batch_size": 2, "max_batch_size": 9},
    {"seed": 5, "adaptive": True, "privacy_unit": "patient", "physical_batch_size": 6},
]
SECURE = {"noise_multiplier": 3.0, "max_grad_norm": 0.5, "loss_reduction": "sum"}


def run(settings, path):
    """Two epochs; saves the gradients of every step and what the engine says."""
    settings = dict(settings)
    seed, ledger = settings.pop("seed", None), settings.pop("ledger", None)
    if settings.pop("adaptive", False):
        settings["threshold"] = dpfast.PrivateQuantile()
    if settings.get("privacy_unit") == "patient":
        settings["privacy_unit_ids"] = [i // 3 for i in range(60)]
    engine = dpfast.PrivacyEngine(
        ledger=ledger, noise=None if seed is None else dpfast.NoiseSource(seed)
    )
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # the first process's weights must count
    model = torch.nn.Linear(WIDTH, 1, bias=False)
    _, model, optimizer, loader = make(
        loader_of(vectors(60, WIDTH), batch_size=10), engine=engine, model=model, **settings
    )
    start = model.weight.clone()
    grads = [g for g in train(model, optimizer, loader, epochs=2) if g is not None]
    result = {
        "grads": torch.cat(grads),
        "weights": torch.cat([start.detach(), model.weight.detach()]),
        "epsilon": engine.report(DELTA).get("conditional_epsilon", engine.get_epsilon(DELTA)),
        "steps": engine.steps,
        "bound": engine.max_grad_norm,
    }
    torch.save(result, path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes saved, for each setting and rank; and the secure run's ledger."""
    folder = tmp_path_factory.mktemp("data_parallel")
    settings = [*SEEDED, {**SECURE, "ledger": str(folder / "ledger.jsonl")}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings), str(folder), str(ROOT)]
    processes = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, cwd=folder, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    saved = [
        [torch.load(folder / f"{number}.{rank}", weights_only=True) for rank in range(2)]
        for number in range(len(settings))
    ]
    return saved, folder / "ledger.jsonl"


@pytest.mark.parametrize("number", range(len(SEEDED)))
def test_two_processes_take_the_steps_of_one(tmp_path, results, number):
    settings = SEEDED[number]
    run(settings, tmp_path / "alone")
    alone = torch.load(tmp_path / "alone", weights_only=True)
    one, two = results[0][number]
    for other in (one, two):
        assert other["steps"] == alone["steps"] == 2 * (2 if "privacy_unit" in settings else 6)
        assert other["epsilon"] == alone["epsilon"]
        # Sums and noise: one key, drawn once.
        torch.testing.assert_close(other["grads"], alone["grads"], rtol=0, atol=1e-6)
        assert other["bound"] == pytest.approx(alone["bound"], rel=1e-9)
    assert torch.equal(one["weights"], two["weights"])


def test_noise_of_two_secure_processes_is_that_of_one(results):
    saved, path = results
    one, two = saved[-1]
    assert torch.equal(one["grads"], two["grads"])
    # Twelve steps of 2000 coordinates; a unit's clipped gradient adds 0.5^2 / 2000 to each.
    want = (1.5**2 + 10 * 0.25 / WIDTH) ** 0.5
    assert float(one["grads"].std()) == pytest.approx(want, rel=5 / (2 * 12 * WIDTH) ** 0.5)
    ledger = dpfast.PrivacyLedger(path)
    assert ledger.spending(0).steps == one["steps"] == two["steps"] == 12
    assert ledger.epsilon(DELTA) == one["epsilon"] == two["epsilon"]


def test_model_wrapped_for_data_parallel_training_is_refused():
    model = torch.nn.DataParallel(torch.nn.Linear(6, 1))
    with pytest.raises(dpfast.PrivacyError, match="must not be wrapped"):
        make(loader_of(vectors(8)), model=model)
