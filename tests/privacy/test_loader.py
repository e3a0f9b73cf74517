"""PrivateLoader: what is handed out, and what is refused."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset, list_data_collate
from monai.data import DataLoader as MonaiLoader
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

import dpfast
from dpfast import PrivacyError
from tests.privacy.helpers import linear, loader_of, make, train, vectors


class Stream(IterableDataset):
    def __iter__(self):
        return iter(vectors(4))


@pytest.mark.parametrize(
    ("data_loader", "error", "message"),
    [
        ([vectors(4)], TypeError, "must be a torch.utils.data.DataLoader, got list"),
        (DataLoader(Stream(), batch_size=2), PrivacyError, "map-style data set"),
        (loader_of(vectors(8), batch_size=None), PrivacyError, "must have a batch_size"),
        (
            loader_of(vectors(8), batch_size=2, sampler=WeightedRandomSampler([1.0] * 8, 8)),
            PrivacyError,
            "no sampler of its own, got WeightedRandomSampler",
        ),
        (
            loader_of(
                vectors(8), batch_size=2,
                sampler=torch.utils.data.RandomSampler(vectors(8), replacement=True),
            ),
            PrivacyError,
            "no sampler of its own",
        ),
        (
            DataLoader(TensorDataset(vectors(8)), batch_sampler=[[0, 1], [2, 3]]),
            PrivacyError,
            "no batch_sampler of its own",
        ),
        (loader_of(vectors(8), batch_size=9), ValueError, "must be <= 8, the number of units"),
    ],
)  # fmt: skip
def test_foreign_loaders_are_refused(data_loader, error, message):
    with pytest.raises(error, match=message):
        make(data_loader)


def test_private_loader_is_not_made_private_twice():
    *_, private = make(loader_of(vectors(8)))
    with pytest.raises(PrivacyError, match="private already"):
        make(private)


def test_epoch_has_as_many_steps_as_the_plain_loader_has_batches():
    engine, model, optimizer, loader = make(loader_of(vectors(10), batch_size=4, shuffle=True))
    assert len(loader) == 3
    train(model, optimizer, loader, epochs=2)
    assert engine.steps == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_sampled_entries(workers):
    x = torch.arange(40.0)[:, None].expand(40, 6)
    engine, model, optimizer, loader = make(
        loader_of(x, batch_size=10, num_workers=workers), noise_multiplier=0.0, max_grad_norm=1e9,
        loss_reduction="sum", clipping="flat",
    )  # fmt: skip
    seen = []
    for _ in range(3):
        for (batch,) in loader:
            model(batch)[:, 0].sum().backward()
            optimizer.step()
            torch.testing.assert_close(model.weight.grad, batch.sum(0, keepdim=True))
            seen.append(batch[:, 0].tolist())
    assert len(seen) == 12
    assert len({len(each) for each in seen}) > 1  # Poisson batches differ in size
    assert all(len(set(each)) == len(each) for each in seen)
    assert engine.steps == 12


# --- structure ---


class Records(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {
            "image": torch.full((1, 4, 4), float(index)),
            "label": np.int64(index % 2),
            "name": f"scan {index}",
            "pair": (torch.ones(2), f"text {index}"),
        }


def test_empty_batches_keep_the_structure():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, affine=True), nn.Flatten())
    _, model, optimizer, loader = make(
        DataLoader(Records(), batch_size=1), model=model, sample_rate=1e-12
    )
    criterion = nn.CrossEntropyLoss(reduction="none")
    for batch in itertools.islice(loader, 5):
        assert batch["image"].shape == (0, 1, 4, 4)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].shape == (0,)
        assert batch["label"].dtype == torch.int64
        assert batch["name"] == []
        assert [type(each) for each in batch["pair"]] == [torch.Tensor, tuple]
        optimizer.zero_grad()
        criterion(model(batch["image"]), batch["label"]).sum().backward()
        optimizer.step()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())  # noise alone


def test_empty_batch_may_be_skipped_by_the_loop():
    engine, model, optimizer, loader = make(loader_of(vectors(8)), sample_rate=1e-12)
    loader = iter(loader)
    for _ in range(3):
        (x,) = next(loader)
        assert len(x) == 0
        optimizer.step()
    assert engine.steps == 3
    assert model.weight.abs().sum() > 0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("collate", [None, list_data_collate])
def test_monai_data_sets_and_loaders(cached, collate):
    records = [{"image": np.full((1, 4, 4), i, np.float32), "patient": i // 2} for i in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = CacheDataset(records, progress=False) if cached else Dataset(records)
        more = {} if collate is None else {"collate_fn": collate}
        kind = DataLoader if collate is None else MonaiLoader
        data_loader = kind(dataset, batch_size=3, **more)
    model = nn.Sequential(nn.Conv2d(1, 1, 4, bias=False), nn.Flatten())
    engine, model, optimizer, loader = make(
        data_loader, model=model, privacy_unit="patient", privacy_unit_ids="patient"
    )
    for batch in loader:
        optimizer.zero_grad()
        model(batch["image"])[:, 0].sum().backward()
        optimizer.step()
    assert engine.steps == len(loader) == 4


def test_crops_of_one_entry_are_clipped_together():
    class Crops(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return [{"x": 3.0 * torch.ones(6)} for _ in range(index + 1)]

    data_loader = DataLoader(Crops(), batch_size=5, collate_fn=list_data_collate)
    _, model, optimizer, loader = make(
        data_loader, noise_multiplier=0.0, loss_reduction="sum", sample_rate=1.0
    )
    (batch,) = loader_of_one_step(loader, model, optimizer)
    assert len(batch["x"]) == 15
    # Five units of norm 1 in the same direction.
    assert float(model.weight.grad.norm()) == pytest.approx(5.0, rel=1e-6)


def loader_of_one_step(loader, model, optimizer):
    batches = []
    for batch in loader:
        model(batch["x"])[:, 0].sum().backward()
        optimizer.step()
        batches.append(batch)
    return batches


# --- parts ---


def test_parts_hold_whole_units_and_change_the_weights_once():
    ids = [i // 3 for i in range(30)]
    _, model, optimizer, loader = make(
        loader_of(vectors(30), torch.tensor(ids), batch_size=10),
        privacy_unit="patient", privacy_unit_ids=ids, sample_rate=1.0, physical_batch_size=7,
    )  # fmt: skip
    assert len(loader) == 1
    sizes, steps = [], []
    for x, unit in loader:
        assert all((unit == u).sum() == 3 for u in unit.unique())
        before = model.weight.clone()
        optimizer.zero_grad()
        model(x)[:, 0].sum().backward()
        optimizer.step()
        sizes.append(len(x))
        steps.append(not torch.equal(before, model.weight))
    assert sizes == [6] * 5
    assert steps == [False] * 4 + [True]


def test_parts_do_not_change_the_result():
    x = vectors(40, seed=3)
    grads = []
    for size in (None, 1, 7, 40):
        engine = dpfast.PrivacyEngine(noise=dpfast.NoiseSource(seed=1))
        _, model, optimizer, loader = make(
            loader_of(x, batch_size=20), engine=engine, physical_batch_size=size
        )
        seen = [g for g in train(model, optimizer, loader) if g is not None]
        assert len(seen) == 2
        grads.append(torch.cat(seen))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=1e-6)


def test_unit_larger_than_a_part_is_refused():
    ids = [0] * 5 + [1]
    settings = {"privacy_unit": "patient", "privacy_unit_ids": ids, "physical_batch_size": 4}
    with pytest.raises(ValueError, match="physical_batch_size must hold all samples of any unit"):
        make(loader_of(vectors(6), batch_size=1), **settings)
    make(loader_of(vectors(6), batch_size=1), **settings, max_samples_per_unit=4)


# --- the loop ---


def test_batch_without_a_step_is_an_error():
    engine, model, optimizer, loader = make(loader_of(vectors(20)))
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(PrivacyError, match=r"optimizer.step\(\) must follow every batch"):
        next(iterator)
    assert engine.steps == 0
    train(model, optimizer, loader)  # the loop can begin again


def test_loop_may_be_left_at_any_time():
    engine, model, optimizer, loader = make(loader_of(vectors(20), batch_size=5))
    for count, (x,) in enumerate(loader):
        if count == 1:
            break
        model(x)[:, 0].sum().backward()
        optimizer.step()
    assert engine.steps == 1
    assert torch.overrides._get_current_function_mode() is None

    def loop():
        for (x,) in loader:
            model(x)[:, 0].sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    train(model, optimizer, loader)
    assert engine.steps == 5
    assert torch.overrides._get_current_function_mode() is None


def test_loop_of_another_engine_closes_one_that_ended_with_an_error():
    _, model, optimizer, loader = make(loader_of(vectors(20)))
    stale = iter(loader)
    next(stale)
    engine, other, other_optimizer, other_loader = make(loader_of(vectors(20)))
    train(other, other_optimizer, other_loader)
    assert engine.steps == len(other_loader)
    model(vectors(2)).sum().backward()
    with pytest.raises(PrivacyError, match="a gradient that the engine did not release"):
        optimizer.step()
    del stale
    assert torch.overrides._get_current_function_mode() is None


def test_evaluation_between_steps_is_left_alone():
    _, model, optimizer, loader = make(loader_of(vectors(12), batch_size=4))
    x = vectors(3)
    for (batch,) in loader:
        with torch.no_grad():
            assert model(x).shape == (3, 1)
        model(batch)[:, 0].sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(model(x), x @ model.weight.T)


def test_linear_model_of_the_tests_has_the_samples_as_gradients():
    model = linear()
    x = vectors(3)
    with dpfast.per_sample_gradients(model) as grads:
        model(x)[:, 0].sum().backward()
    torch.testing.assert_close(grads["weight"][:, 0], x)
