"""The private step on segmentation: U-Net, Dice and cross-entropy, records of the data layer."""

import pytest
import torch
from monai.losses.dice import DiceCELoss
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader

import dpfast
from dpfast.segmentation import make_dataset, phantom_records, phantom_task
from dpfast.segmentation.models import build_model

TASK = phantom_task(2)
RECORDS = phantom_records(6, 2)


def small_unet():
    return build_model("unet", TASK, {"channels": [4, 8], "strides": [2]})


def released(records, *, noise_multiplier=0.0, sample_rate=1.0, **settings):
    """What the first step puts into the gradients: the sum over the records that take part."""
    model = small_unet()
    criterion = dpfast.per_sample_loss(
        DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    )
    engine = dpfast.PrivacyEngine(noise=dpfast.NoiseSource(seed=0))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(make_dataset(records, TASK), batch_size=1),
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        sample_rate=sample_rate,
        loss_reduction="sum",
        **settings,
    )
    samples = 0
    for batch in loader:
        samples += len(batch["label"])
        optimizer.zero_grad()
        criterion(model(batch["image"]), batch["label"]).sum().backward()
        optimizer.step()
        if engine.steps:
            break
    return samples, torch.cat([p.grad.flatten() for p in model.parameters()]).double()


@pytest.mark.parametrize("clipping", ["automatic", "flat", "auto_v", "psac"])
def test_sum_moves_by_at_most_the_bound_when_a_record_is_removed(clipping):
    _, whole = released(RECORDS, clipping=clipping)
    for removed in range(len(RECORDS)):
        rest = [record for index, record in enumerate(RECORDS) if index != removed]
        _, part = released(rest, clipping=clipping)
        # 1e-5: the sums are rounded to float32.
        assert 0.01 < (whole - part).norm() <= 1.0 + 1e-5


@pytest.mark.parametrize("clipping", ["automatic", "flat"])
def test_sum_moves_by_at_most_the_bound_when_a_patient_is_removed(clipping):
    records = phantom_records(3, 2, slices_per_patient=3)
    patients = {"privacy_unit": "patient", "privacy_unit_ids": "patient_id", "clipping": clipping}
    samples, whole = released(records, **patients)
    assert samples == 9
    for patient in {record["patient_id"] for record in records}:
        rest = [record for record in records if record["patient_id"] != patient]
        samples, part = released(rest, **patients)
        assert samples == 6
        assert 0.01 < (whole - part).norm() <= 1.0 + 1e-5


def test_sum_equals_that_of_torch_func():
    model, dataset = small_unet(), make_dataset(RECORDS, TASK)
    criterion = DiceCELoss(include_background=False, softmax=True)
    images = torch.stack([entry["image"] for entry in dataset])
    labels = torch.stack([entry["label"] for entry in dataset])
    # One-hot here because MONAI's own conversion writes in place, which vmap forbids.
    one_hot = nn.functional.one_hot(labels[:, 0], TASK.num_classes).movedim(-1, 1).float()

    def loss(params, image, target):
        return criterion(functional_call(model, params, (image[None],)), target[None])

    params = {name: value.detach() for name, value in model.named_parameters()}
    grads = vmap(grad(loss), (None, 0, 0))(params, images, one_hot)
    norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
    weights = 1.0 / (norms + 0.01)  # AUTO-S with a bound of 1
    twin = torch.cat(
        [torch.einsum("b,b...->...", weights, grads[name]).flatten() for name in params]
    )
    _, found = released(RECORDS, clipping="automatic")
    torch.testing.assert_close(found, twin.double(), rtol=0, atol=1e-4)


def test_step_does_not_depend_on_the_physical_batches():
    results = [
        released(RECORDS, noise_multiplier=1.0, clipping="automatic", physical_batch_size=size)
        for size in (2, 5, None)
    ]
    assert [samples for samples, _ in results] == [6, 6, 6]
    # Noise included: added per physical batch it would differ by about 1 everywhere.
    for _, result in results[1:]:
        torch.testing.assert_close(result, results[0][1], rtol=0, atol=5e-5)


def test_empty_batch_releases_noise_of_the_stated_scale():
    samples, noise = released(RECORDS, noise_multiplier=2.0, sample_rate=1e-12)
    assert samples == 0
    # 5 standard errors of a sample standard deviation.
    assert noise.std() == pytest.approx(2.0, rel=5 / (2 * noise.numel()) ** 0.5)
