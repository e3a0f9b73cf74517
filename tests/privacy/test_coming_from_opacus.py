"""docs/coming_from_opacus.md: its names exist, and its loops run."""

import dataclasses
import importlib.util
import inspect
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.privacy.budget import PlannedRun

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from_opacus.md").read_text()
BEFORE, AFTER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def opacus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("opacus", reason="the page is about Opacus")


def rows(heading):
    """The cells of all tables below a heading, without their first two lines."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        for table in tables
    ]


def names(cell):
    """What stands between backticks, up to its value or call."""
    return [found.split("=")[0].split("(")[0] for found in re.findall(r"`([^`]+)`", cell)]


def resolve(dotted):
    """The object of a dotted name."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:end]))
        found = getattr(found, part)
    return found


def parameters(function):
    return {name for name in inspect.signature(function).parameters if name != "self"}


def namespace(count=40):
    model = nn.Sequential(nn.Flatten(1), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(count, 2, 2), torch.randint(2, (count,)))
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": DataLoader(data, batch_size=4),
    }


def short(loop):
    """One epoch and much noise, which is quick to account."""
    for old, new in (("30", "1"), ("target_epsilon=8.0", "target_epsilon=0.5")):
        assert old in loop
        loop = loop.replace(old, new)
    return loop


def test_loop_after_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = namespace()
    model, optimizer = given["model"], given["optimizer"]
    before = model[1].weight.clone()
    exec(short(AFTER), given)
    assert given["model"] is model
    assert given["optimizer"] is optimizer
    assert not torch.equal(model[1].weight, before)
    assert torch.load("model.pt").keys() == {"1.weight", "1.bias"}
    assert float(capsys.readouterr().out) == given["engine"].get_epsilon(1e-5) <= 0.5
    assert given["engine"].steps == len(given["loader"]) == 10


def test_loop_before_runs(opacus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = namespace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(short(BEFORE), given)
    assert all(name.startswith("_module.") for name in given["model"].state_dict())
    assert torch.load("model.pt").keys() == {"1.weight", "1.bias"}


def test_every_argument_of_opacus_is_on_the_page(opacus):
    assert opacus.version.__version__.startswith("1.6.")
    [table] = rows("Arguments of `make_private`")
    stated = {name for row in table for name in names(row[0])}
    assert stated == parameters(opacus.PrivacyEngine.make_private)
    both = set(names(PAGE.split("`make_private_with_epsilon` has ")[1].split(" in both")[0]))
    ours = parameters(dpfast.PrivacyEngine.make_private_with_epsilon)
    assert both <= parameters(opacus.PrivacyEngine.make_private_with_epsilon) & ours
    assert ours - both | {"noise_multiplier"} == parameters(dpfast.PrivacyEngine.make_private)


def test_every_argument_of_dpfast_on_the_page_exists():
    [table] = rows("Arguments of `make_private`")
    known = parameters(dpfast.PrivacyEngine.make_private) | parameters(dpfast.PrivacyEngine)
    stated = {name for row in table for name in names(row[1])}
    assert stated <= known
    assert len(stated) > 12
    text = " ".join(row[2] for row in table)
    rules = re.findall(r'`"(\w+)"`', text)
    assert len(rules) == 4
    for rule in rules:
        bound = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "clipping": rule}
        dpfast.clip_and_noise(torch.zeros(2, 3), **bound)


def test_every_name_of_opacus_on_the_page_exists(opacus):
    dotted = set(re.findall(r"`(opacus\.[\w.]+)`", PAGE))
    assert len(dotted) > 15
    dotted.remove("opacus.lightning")  # needs Lightning
    assert importlib.util.find_spec("opacus.lightning")
    for name in dotted:
        resolve(name)
    modes = set(re.findall(r'grad_sample_mode="(\w+)"', PAGE))
    known = importlib.import_module("opacus.grad_sample.utils")
    assert modes == {"ghost", "ghost_fsdp"}
    for mode in modes:
        assert issubclass(known.get_gsm_class(mode), nn.Module)


def test_every_name_of_dpfast_on_the_page_exists():
    dotted = set(re.findall(r"`(dpfast\.[\w.]+)`", PAGE))
    assert len(dotted) > 6
    for name in dotted:
        resolve(name)


def test_fields_of_the_private_quantile_are_those_of_the_page(opacus):
    _, table = rows("Everything else")
    stated = {names(row[0])[0]: names(row[1])[0] for row in table}
    fields = {field.name for field in dataclasses.fields(dpfast.PrivateQuantile)}
    assert set(stated.values()) == fields
    adaptive = parameters(opacus.optimizers.AdaClipDPOptimizer)
    assert stated.keys() <= adaptive


def test_sample_rates_are_those_of_the_page(opacus):
    found = re.search(
        r"(\d+) samples in batches\nof (\d+) are (\d+) batches, hence ([\d.]+)\. dpfast takes "
        r"(\d+) / (\d+) = ([\d.]+)\. Both take (\d+) steps",
        PAGE,
    )
    count, size, batches, theirs, same_size, same_count, ours, steps = map(float, found.groups())
    assert (size, count, steps) == (same_size, same_count, batches)
    given = namespace(int(count))
    plain = DataLoader(given["loader"].dataset, batch_size=int(size))
    private = opacus.data_loader.DPDataLoader.from_data_loader(plain)
    assert round(private.sample_rate, 5) == theirs
    assert len(private) == batches
    model, optimizer = given["model"], given["optimizer"]
    engine = dpfast.PrivacyEngine()
    _, _, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=plain, noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    assert len(loader) == batches
    assert engine.ledger.mechanisms[0].description["sample_rate"] == ours


def test_opacus_accounts_for_any_loader_as_for_a_poisson_sampler(opacus):
    given = namespace()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = opacus.PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=given["model"], optimizer=given["optimizer"], data_loader=given["loader"],
            noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False,
        )  # fmt: skip
        assert loader is given["loader"]
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert engine.accountant.history == [(1.0, 1 / 10, 10)]


def test_equal_weights_are_opacus_noise_per_layer(opacus):
    bounds = [0.5, 2.0]
    model = nn.Linear(3, 2)
    private = opacus.optimizers.DPPerLayerOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.5,
        max_grad_norm=bounds,
        expected_batch_size=4,
    )
    run = PlannedRun(sample_rate=0.1, noise_multiplier=1.5, max_grad_norm=bounds)
    std = private.noise_multiplier * private.max_grad_norm
    assert run.noise_scales() == pytest.approx([std] * 2)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused(layer):
    module = layer(3, 4, batch_first=True)
    with (
        pytest.raises(NotImplementedError, match="has no rule"),
        dpfast.per_sample_gradients(module),
    ):
        module(torch.randn(2, 5, 3))


def test_attention_needs_no_replacement():
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(3, 5, 4)
    with dpfast.per_sample_gradients(module) as grads:
        module(x, x, x)[0].square().sum((1, 2)).sum().backward()
    assert dict(grads)["in_proj_weight"].shape == (3, 12, 4)


def test_epsilon_of_a_seeded_run_is_infinite():
    given = namespace()
    engine = dpfast.PrivacyEngine(noise=dpfast.NoiseSource(seed=1))
    model, optimizer, loader = engine.make_private(
        module=given["model"], optimizer=given["optimizer"], data_loader=given["loader"],
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction="none").sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
    assert engine.get_epsilon(1e-5) == math.inf
