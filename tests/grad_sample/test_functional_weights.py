"""Parameters used outside of layers: computed with, added to the input, written in place."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.grad_sample.helpers import check, check_right_or_refused, energy, random, randomise


class Functional(nn.Module):
    """A weight (4, 3), a scale (4, 1), a shift (3), a scalar and a frozen weight, used by `use`."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.empty(4, 3))
        self.scale = nn.Parameter(torch.empty(4, 1))
        self.shift = nn.Parameter(torch.empty(3))
        self.gain = nn.Parameter(torch.empty(()))
        self.frozen = nn.Parameter(torch.empty(4, 3), requires_grad=False)
        self.register_buffer("mask", torch.tensor([[1.0, 0.0, 2.0]]))

    def forward(self, x):
        # Every parameter takes part somehow.
        return self.use(self, x + self.shift) * self.gain + self.scale.sum() + self.weight.sum()


USES = {
    "scaled": lambda m, x: nn.functional.linear(x, m.weight * m.scale),
    "transposed": lambda m, x: x @ m.weight.t(),
    "property": lambda m, x: x @ m.weight.T,
    "matmul": lambda m, x: torch.matmul(x, m.weight.mT),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.weight),
    "normalised": lambda m, x: nn.functional.linear(x, m.weight / m.weight.norm()),
    "standardised": lambda m, x: nn.functional.linear(
        x, (m.weight - m.weight.mean(1, keepdim=True)) / m.weight.std(1, keepdim=True)
    ),
    "normalize": lambda m, x: nn.functional.linear(x, nn.functional.normalize(m.weight, dim=1)),
    "masked": lambda m, x: nn.functional.linear(x, m.weight * m.mask),
    "rows": lambda m, x: nn.functional.linear(x, torch.stack([m.weight[3], m.weight[0]])),
    "halves": lambda m, x: torch.cat([nn.functional.linear(x, w) for w in m.weight.chunk(2)], 1),
    "gathered": lambda m, x: m.weight[x.argmax(1)] * x,
    "shifted": lambda m, x: (x - m.shift) * m.shift.exp(),
    "added to loss": lambda m, x: x + m.weight.square().sum(),
    "linear combination": lambda m, x: torch.addmm(m.shift, x, m.weight.t() @ m.weight),
    "with frozen": lambda m, x: nn.functional.linear(x, m.frozen + m.scale @ m.shift[None]),
    "frozen scaled": lambda m, x: nn.functional.linear(x, m.frozen * m.scale),
}
NOT_PROMISED = {
    "detached norm": lambda m, x: nn.functional.linear(x, m.weight / m.weight.detach().norm()),
    "constant": lambda m, x: nn.functional.linear(x, m.weight * torch.ones(3).double()),
    "unpacked": lambda m, x: x * next(iter(m.weight)),
    "assigned": lambda m, x: x.clone().index_put_((torch.tensor([0]),), m.shift),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("batch_size", [0, 1, 3, 4])
def test_functional_use_of_a_weight_equals_one_at_a_time(use, batch_size):
    model = randomise(Functional(USES[use]).double())
    check(model, energy, random(batch_size, 3))


@pytest.mark.parametrize("use", NOT_PROMISED)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_other_use_of_a_weight_is_right_or_refused(use, batch_size):
    model = randomise(Functional(NOT_PROMISED[use]).double())
    check_right_or_refused(model, energy, random(batch_size, 3))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 2)])
def test_weight_norm_equals_one_at_a_time(layer):
    model = weight_norm(randomise(layer.double()))
    check(model, energy, random(3, *([4, 5] if isinstance(layer, nn.Conv1d) else [4])))


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (4,), ()])
@pytest.mark.parametrize("batch_size", [0, 1, 5])
def test_position_embedding_added_to_the_input_equals_one_at_a_time(shape, batch_size):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.empty(shape))
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x + self.positions)

    check(randomise(Positions().double()), energy, random(batch_size, 5, 4))


def test_parameter_added_in_place_equals_one_at_a_time():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(2, 3, 1)
            self.scale = nn.Parameter(torch.empty(3, 1))
            self.shift = nn.Parameter(torch.empty(1, 3, 5))

        def forward(self, x):
            x = self.layer(x)
            x *= self.scale
            x += self.shift
            x.sub_(self.scale, alpha=0.5)
            return x.sigmoid_()

    check(randomise(InPlace().double()), energy, random(4, 2, 5))


def test_parameter_added_in_place_to_a_view_equals_one_at_a_time():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)
            self.shift = nn.Parameter(torch.empty(3))

        def forward(self, x):
            x = self.layer(x) * 1.0
            x[:, 1:4] += self.shift
            return x

    check(randomise(View().double()), energy, random(5, 4))
