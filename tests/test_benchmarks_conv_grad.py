"""The benchmark of convolutions' gradients: answers come first, and work is counted right."""

import json

import pytest
import torch

from tests import benchmark_modules

benchmark_modules.load()

from benchmarks import _cli, conv_grad  # noqa: E402
from benchmarks._answers import WrongAnswerError  # noqa: E402
from benchmarks.conv_grad import Case  # noqa: E402

CPU = torch.device("cpu")


def test_rows_are_checked_saved_and_shown(tmp_path, capsys):
    assert _cli.main(["conv_grad", "--quick", "--rounds", "1", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "quick-conv_grad.json").read_text())["rows"]
    assert [Case.from_json(row["case"]) for row in rows] == conv_grad.cases("cpu", quick=True)
    for row in rows:
        assert max(row["checks"].values()) < 2e-4
        assert set(row["over_dpfast"]) == set(conv_grad.PEERS)
        assert row["operations_per_second"]["median"] > 0
    assert "per-sample gradients" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "case",
    [
        Case(2, (3, 5), (8, 6)),
        Case(2, (3, 5), (8, 6), stride=2),
        Case(3, (4, 2), (4, 4, 6), stride=2, transposed=True),
    ],
)
def test_operations_are_those_of_the_definition(case):
    # Inside, every output position meets every tap; around the border some meet padding.
    layer = conv_grad._Layer(case, CPU)
    smaller = layer.x if case.transposed else layer.grad_output
    positions = smaller[0, 0].numel()
    taps = 3 ** len(case.size)
    products = case.batch_size * case.channels[0] * case.channels[1] * taps * positions
    assert case.operations == 2 * products
    assert case.bytes(layer.x, layer.grad_output) == 4 * (
        layer.x.numel() + layer.grad_output.numel() + case.batch_size * layer.weight.numel()
    )


@pytest.mark.parametrize("name", ["dpfast", "norms", "loop", "grouped", "batch"])
def test_a_wrong_answer_is_found(monkeypatch, name):
    original = getattr(conv_grad._Layer, name)

    def wrong(self, *arguments):
        found = original(self, *arguments)
        return found * 1.001 if found.dtype != torch.float64 or name == "norms" else found

    monkeypatch.setattr(conv_grad._Layer, name, wrong)
    with pytest.raises(WrongAnswerError):
        conv_grad._Layer(Case(2, (3, 5), (8, 8)), CPU).check()
