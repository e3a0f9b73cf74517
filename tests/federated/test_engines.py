"""One client function under every engine: the same weights, bit for bit."""

import hashlib

import pytest
import torch

pytest.importorskip("flwr")

from dpfast.federated.training import federate

from .processes import Command, Federation
from .sites import write
from .test_training import Watch

pytestmark = pytest.mark.slow
CHANGES = {
    "sites": {"number": 2},
    "federation": {"rounds": 2, "seed": 5},
    "privacy": {"threshold": {"kind": "private_quantile"}},
    "training": {"proximal_mu": 0.1},
}


def weight_hash(run):
    found = hashlib.sha256()
    for name, tensor in sorted(torch.load(run / "model.pt", weights_only=True).items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("in_process")
    report = federate(write(folder, **CHANGES), Watch())
    torch.set_num_threads(threads)
    return weight_hash(folder / "run"), report


def test_ray_gives_the_same_weights(wanted, tmp_path):
    pytest.importorskip("ray")
    file = write(tmp_path, **CHANGES)
    run = Command(tmp_path, "ray", "federate", file, "--engine", "flower")
    assert run.wait(400) == 0, run.said
    assert weight_hash(tmp_path / "run") == wanted[0]


def test_tls_gives_the_same_weights(wanted, tmp_path):
    with Federation(tmp_path, write(tmp_path, **CHANGES), ["site 1", "site 2"]) as federation:
        server = federation.serve()
        for name in federation.names:
            federation.join(name)
        assert server.wait(200) == 0, server.said
    assert weight_hash(tmp_path / "run") == wanted[0]
