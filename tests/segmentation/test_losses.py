"""Per-sample losses: MONAI's own value for one sample, and no way from one sample to another."""

import pytest
import torch
from torch import nn

import dpfast
from dpfast import PrivacyError, per_sample_loss

losses = pytest.importorskip("monai.losses")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

B, C, SIZE = 5, 3, 8
WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


def logits(channels=C):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, channels, SIZE, SIZE, generator=generator)


def labels():
    return torch.randint(0, C, (B, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(2))


def masks(channels=1):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(B, channels, SIZE, SIZE, generator=generator).round()


def one_hot():
    return nn.functional.one_hot(labels()[:, 0], C).movedim(-1, 1).float()


MULTICLASS = {"softmax": True, "to_onehot_y": True}
CASES = {
    "dice, sigmoid": (losses.DiceLoss(sigmoid=True), logits(1), masks()),
    "dice, classes": (losses.DiceLoss(include_background=False, **MULTICLASS), logits(), labels()),
    "dice, weighted": (losses.DiceLoss(weight=[1, 2, 3], **MULTICLASS), logits(), labels()),
    "dice, sum": (losses.DiceLoss(sigmoid=True, reduction="sum"), logits(2), masks(2)),
    "dice ce, sigmoid": (losses.DiceCELoss(sigmoid=True), logits(1), masks()),
    "dice ce, classes": (losses.DiceCELoss(**MULTICLASS), logits(), labels()),
    "dice ce, weighted": (losses.DiceCELoss(weight=WEIGHTS, **MULTICLASS), logits(), labels()),
    "dice ce, smoothed": (
        losses.DiceCELoss(softmax=True, label_smoothing=0.1, lambda_ce=0.5),
        logits(),
        one_hot(),
    ),
    "tversky": (losses.TverskyLoss(**MULTICLASS), logits(), labels()),
    "focal": (losses.FocalLoss(to_onehot_y=True), logits(), labels()),
    "focal, softmax": (
        losses.FocalLoss(to_onehot_y=True, use_softmax=True, weight=[1, 2, 3]),
        logits(),
        labels(),
    ),
    "generalised dice": (losses.GeneralizedDiceLoss(**MULTICLASS), logits(), labels()),
    "dice focal": (losses.DiceFocalLoss(**MULTICLASS), logits(), labels()),
    "cross-entropy": (nn.CrossEntropyLoss(ignore_index=1), logits(), labels()[:, 0]),
    "cross-entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), logits(), labels()[:, 0]),
    "cross-entropy, weighted": (nn.CrossEntropyLoss(weight=WEIGHTS), logits(), labels()[:, 0]),
    "cross-entropy, soft": (nn.CrossEntropyLoss(), logits(), one_hot()),
    "binary cross-entropy": (nn.BCEWithLogitsLoss(), logits(2), masks(2)),
    "deep supervision": (
        losses.DeepSupervisionLoss(losses.DiceCELoss(**MULTICLASS)),
        [logits(), logits()[..., ::2, ::2]],
        labels().float(),
    ),
    "l1": (nn.L1Loss(), logits(2), masks(2)),
}


def sample(value, b):
    if isinstance(value, list):
        return [part[b : b + 1] for part in value]
    return value[b : b + 1]


@pytest.mark.parametrize("name", CASES)
def test_each_entry_is_the_losss_own_value_for_that_sample(name):
    loss, input, target = CASES[name]
    found = per_sample_loss(loss)(input, target)
    truth = [loss(sample(input, b), target[b : b + 1]).reshape(()) for b in range(B)]
    assert found.shape == (B,)
    torch.testing.assert_close(found, torch.stack(truth), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_no_entry_depends_on_another_sample(name):
    loss, input, target = CASES[name]
    parts = [p.clone().requires_grad_() for p in (input if isinstance(input, list) else [input])]
    found = per_sample_loss(loss)(parts if isinstance(input, list) else parts[0], target)
    for b in range(B):
        for grad in torch.autograd.grad(found[b], parts, retain_graph=True):
            others = torch.cat([grad[:b], grad[b + 1 :]])
            assert (others == 0.0).all()
            assert (grad[b] != 0.0).any()


@pytest.mark.parametrize("name", CASES)
def test_replacing_one_record_moves_the_clipped_sum_by_at_most_twice_the_bound(name):
    loss, input, target = CASES[name]
    channels = (input[0] if isinstance(input, list) else input).shape[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PReLU(), nn.Conv2d(4, channels, 1))
    images = torch.randn(B, 1, SIZE, SIZE)
    criterion = per_sample_loss(loss)

    def clipped_sum(images, target):
        with dpfast.per_sample_gradients(model) as grads:
            output = model(images)
            criterion(
                [output, output[..., ::2, ::2]] if isinstance(input, list) else output, target
            ).sum().backward()
        result = dpfast.clip_and_noise(
            grads, max_grad_norm=1.0, noise_multiplier=0.0, mechanism="none"
        )
        return torch.cat([part.flatten() for part in result.values()])

    changed_images, changed_target = images.clone(), target.clone()
    changed_images[2] = 50.0 * torch.randn(1, SIZE, SIZE)
    changed_target[2] = target[3]
    moved = clipped_sum(changed_images, changed_target) - clipped_sum(images, target)
    assert moved.norm() <= 2.0 * (1 + 1e-6)
    assert moved.norm() > 1e-3


def test_a_batch_dice_is_refused():
    with pytest.raises(PrivacyError, match="batch=False"):
        per_sample_loss(losses.DiceLoss(batch=True))
    with pytest.raises(PrivacyError, match=r"DiceLoss \(dice\).*batch=False"):
        per_sample_loss(losses.DiceCELoss(batch=True))


def test_a_loss_without_one_number_per_sample_is_refused():
    with pytest.raises(PrivacyError, match="reduction mean or sum, got none"):
        per_sample_loss(nn.L1Loss(reduction="none"))

    class Pixelwise(nn.Module):
        def forward(self, input, target):
            return (input - target) ** 2

    with pytest.raises(PrivacyError, match=r"one number for one sample, got shape \(1, 2"):
        per_sample_loss(Pixelwise())(logits(2), masks(2))


def test_a_loss_that_keeps_statistics_is_refused():
    with pytest.raises(PrivacyError, match="keeps statistics"):
        per_sample_loss(nn.Sequential(nn.BatchNorm2d(2)))


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        per_sample_loss(nn.functional.mse_loss)


def test_different_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match="target must have 5 samples like input, got 4"):
        per_sample_loss(nn.L1Loss())(logits(), logits()[:4])


@pytest.mark.parametrize("name", ["dice ce, classes", "generalised dice"])
def test_an_empty_batch_gives_an_empty_vector_with_a_graph(name):
    loss, input, target = CASES[name]
    weight = torch.ones(1, requires_grad=True)
    found = per_sample_loss(loss)(input[:0] * weight, target[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert weight.grad == 0.0


def test_wrapping_leaves_the_loss_as_it_was():
    loss = losses.DiceCELoss(**MULTICLASS)
    before = loss(logits(), labels())
    per_sample_loss(loss)(logits(), labels())
    assert loss.dice.reduction == "mean"
    assert loss(logits(), labels()) == before


def test_a_batchs_loss_weighted_by_sample_breaks_the_bound_where_ours_keeps_it():
    # Ghost clipping by the sum of coefficient times criterion, whose reduction is set to "none"
    # from outside: MONAI's losses do not hear of it, and one number for the batch is broadcast.
    torch.manual_seed(0)
    model = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
    images, target = torch.randn(B, 1, SIZE, SIZE), masks()
    other_images, other_target = images.clone(), target.clone()
    # In the one a record far off, of a large gradient, in the other an ordinary one.
    images[0] = 200.0 * torch.rand(1, SIZE, SIZE)
    target[0] = 0.0

    def gradient(value):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]
        )

    def weighted_by_sample(images, target):
        criterion = losses.DiceCELoss(sigmoid=True)
        norms = [
            gradient(criterion(model(images[b : b + 1]), target[b : b + 1])).norm()
            for b in range(B)
        ]
        criterion.reduction = "none"
        weights = (1.0 / torch.stack(norms)).clamp(max=1.0)
        return gradient((weights[:, None] * criterion(model(images), target)).sum())

    def ours(images, target):
        with dpfast.per_sample_gradients(model) as grads:
            per_sample_loss(losses.DiceCELoss(sigmoid=True))(model(images), target).sum().backward()
        sums = dpfast.clip_and_noise(
            grads, max_grad_norm=1.0, noise_multiplier=0.0, mechanism="none"
        )
        return torch.cat([part.flatten() for part in sums.values()])

    broken = weighted_by_sample(images, target) - weighted_by_sample(other_images, other_target)
    assert broken.norm() > 90.0
    assert (ours(images, target) - ours(other_images, other_target)).norm() <= 2.0
