"""The detector of coupled samples."""

import pytest
import torch
from torch import nn

from dpfast import PrivacyError, per_sample_loss, refuse_coupling

B = 3


def images():
    return torch.randn(B, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def labels():
    return torch.randint(0, 2, (B, 8, 8), generator=torch.Generator().manual_seed(1))


def network(*layers):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Conv2d(4, 2, 1))


CROSS_ENTROPY = per_sample_loss(nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(4),
        nn.Dropout(0.5),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(4).eval(),
    ],
)
def test_independent_samples_pass(layer):
    model = network(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    refuse_coupling(model, images(), CROSS_ENTROPY, labels())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class _Mixing(nn.Module):
    """A batch mean under another name."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.detach().sum()
        return x


class _Wrong(nn.Module):
    """Positions before samples: rows that a linear layer takes for the samples'."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        rows = x.movedim(1, 3).flatten(1, 2).transpose(0, 1)  # (positions, B, C)
        rows = self.inner(rows.flatten(0, 1)).unflatten(0, (-1, len(x)))
        return rows.transpose(0, 1).unflatten(1, (8, 8)).movedim(3, 1)


def test_a_layer_that_mixes_samples_is_refused():
    with pytest.raises(PrivacyError, match="the loss of sample 0 depends on sample"):
        refuse_coupling(network(_Mixing()), images(), CROSS_ENTROPY, labels())


def test_a_loss_that_mixes_samples_is_refused():
    def batch_dice(output, target):
        share = output.softmax(1)[:, 1]
        dice = 1 - 2 * (share * target).sum() / (share.sum() + target.sum())
        return dice.expand(len(output))

    with pytest.raises(PrivacyError, match="the loss of sample 0 depends on sample"):
        refuse_coupling(network(nn.ReLU()), images(), batch_dice, labels())


def test_a_loss_of_another_shape_is_refused():
    with pytest.raises(PrivacyError, match=r"must have shape \(3,\).*got \(\)"):
        refuse_coupling(network(nn.ReLU()), images(), nn.CrossEntropyLoss(), labels())


def test_a_changing_buffer_is_refused():
    with pytest.raises(PrivacyError, match=r"changes the buffer 1\.seen"):
        refuse_coupling(network(_Counting()), images(), CROSS_ENTROPY, labels())


def test_samples_on_another_axis_are_refused():
    with pytest.raises(PrivacyError, match=r"gradient of 1\.inner\.weight is not that of sample"):
        refuse_coupling(network(_Wrong()), images(), CROSS_ENTROPY, labels())


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least two samples"):
        refuse_coupling(network(nn.ReLU()), images()[:1], CROSS_ENTROPY, labels()[:1])
