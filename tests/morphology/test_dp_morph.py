"""DPMorph: what is done to which channel, sample by sample, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dpfast
from dpfast.morphology import DPMorph, PerChannel, apply, closing, ellipse, opening
from dpfast.morphology.dp_morph import nearest_odd


def scores(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (2, 3, 6, 7, 5)])
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("open", lambda x: opening(x, 3)),
        ("opening", lambda x: opening(x, 3)),
        ("close", lambda x: closing(x, 3)),
        ("both", lambda x: closing(opening(x, 3), 3)),
        ("dilation", lambda x: apply(x, "dilation", 3)),
    ],
)
def test_every_foreground_channel_is_changed_and_the_background_is_not(shape, operation, expected):
    x = scores(*shape)
    result = DPMorph(operation, 3)(x)
    assert torch.equal(result[:, 0], x[:, 0])
    assert torch.equal(result[:, 1:], expected(x)[:, 1:])
    assert not torch.equal(result[:, 1:], x[:, 1:])


def test_without_background_every_channel_is_changed():
    x = scores(2, 3, 9, 8)
    assert torch.equal(DPMorph("open", 3, background=None)(x), opening(x, 3))
    assert torch.equal(DPMorph("open", 3, background=1)(x)[:, [0, 2]], opening(x, 3)[:, [0, 2]])


def test_a_single_channel_is_a_foreground():
    x = scores(2, 1, 9, 8)
    assert torch.equal(DPMorph("close", 3)(x), closing(x, 3))


def test_classes_have_operations_and_sizes_of_their_own():
    x = scores(2, 5, 9, 8)
    morph = DPMorph("close", 3, {1: ("open", (5, 3)), 3: None})
    operations = PerChannel("identity", "opening", "closing", "identity", "closing")
    expected = apply(x, operations, PerChannel(1, (5, 3), 3, 1, 3))
    assert torch.equal(morph(x), expected)
    sequence = [None, ("open", (5, 3)), ("close", 3), None, ("close", 3)]
    assert torch.equal(DPMorph(per_class=sequence)(x), expected)


def test_the_background_is_changed_where_it_is_named():
    x = scores(2, 2, 9, 8)
    result = DPMorph("open", 3, {0: ("close", 3)})(x)
    assert torch.equal(result, torch.cat([closing(x, 3)[:, :1], opening(x, 3)[:, 1:]], 1))


def test_closing_the_background_complements_opening_the_foreground():
    mask = (scores(4, 1, 16, 16) > 0).float()
    result = DPMorph("open", 3, {0: ("close", 3)})(torch.cat([1 - mask, mask], 1))
    assert torch.equal(result[:, 0], 1 - result[:, 1])


def test_footprint_and_border_are_those_of_apply():
    x = scores(2, 2, 9, 8)
    result = DPMorph("open", 5, background=None, footprint="ellipse", border="reflect")(x)
    assert torch.equal(result, opening(x, footprint=ellipse(5), border="reflect"))


def test_increasing_functions_change_places_with_a_single_channel():
    x = scores(2, 1, 9, 8).double()
    morph = DPMorph("both", 3)
    assert torch.equal(morph(x).sigmoid(), morph(x.sigmoid()))


def test_deep_supervision_keeps_the_elements_share_of_the_image():
    fine, coarse, coarser = scores(2, 2, 16, 16), scores(2, 2, 8, 8), scores(2, 2, 8, 4)
    morph = DPMorph("open", 7)
    results = morph([fine, coarse, coarser])
    assert isinstance(results, list)
    assert torch.equal(results[0], morph(fine))
    assert torch.equal(results[1], DPMorph("open", 3)(coarse))
    assert torch.equal(results[2], DPMorph("open", (3, 1))(coarser))
    assert isinstance(morph((fine, coarse)), tuple)


def test_deep_supervision_with_ellipses_in_3d():
    fine, coarse = scores(1, 2, 8, 8, 8), scores(1, 2, 4, 4, 4)
    morph = DPMorph("close", 5, footprint="ellipse")
    expected = closing(coarse, footprint=ellipse(3, spatial_dims=3))
    assert torch.equal(morph([fine, coarse])[1][:, 1], expected[:, 1])


@pytest.mark.parametrize(
    ("value", "odd"), [(0.2, 1), (1.0, 1), (1.9, 1), (2.0, 3), (3.9, 3), (4.0, 5), (7.0, 7)]
)
def test_nearest_odd(value, odd):
    assert nearest_odd(value) == odd


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))


def criterion(morph):
    loss = dpfast.per_sample_loss(nn.CrossEntropyLoss())
    return lambda out, target: loss(morph(out), target)


def test_per_sample_gradients_are_those_of_one_sample_at_a_time():
    model, loss = network(), criterion(DPMorph("both", 3, {2: ("close", 5)}))
    x, target = scores(4, 1, 12, 12), torch.randint(3, (4, 12, 12))
    with dpfast.per_sample_gradients(model) as grads:
        loss(model(x), target).sum().backward()
    params = dict(model.named_parameters())
    for b in range(4):
        alone = loss(model(x[b : b + 1]), target[b : b + 1]).sum()
        for name, expected in zip(
            params, torch.autograd.grad(alone, list(params.values())), strict=True
        ):
            torch.testing.assert_close(grads[name][b], expected, rtol=1e-5, atol=1e-6)


def test_samples_stay_independent():
    loss = criterion(DPMorph("both", 3))
    dpfast.refuse_coupling(network(), scores(2, 1, 8, 8), loss, torch.randint(3, (2, 8, 8)))


def test_the_check_finds_a_morphology_across_samples():
    class AcrossSamples(nn.Module):
        def forward(self, x):
            return DPMorph("close", 3, background=None)(x.transpose(0, 1)[None])[0].transpose(0, 1)

    with pytest.raises(dpfast.PrivacyError, match="sample"):
        dpfast.refuse_coupling(
            network(), scores(2, 1, 8, 8), criterion(AcrossSamples()), torch.randint(3, (2, 8, 8))
        )


def test_the_engine_takes_it_and_an_empty_batch_passes():
    model, loss = network(), criterion(DPMorph("close", 3))
    data = torch.utils.data.TensorDataset(scores(8, 1, 8, 8), torch.randint(3, (8, 8, 8)))
    engine = dpfast.PrivacyEngine()
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        criterion=loss,
        probe=(scores(2, 1, 8, 8), torch.randint(3, (2, 8, 8))),
    )
    before = [p.detach().clone() for p in model.parameters()]
    for x, target in loader:
        optimizer.zero_grad()
        loss(model(x), target).sum().backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert DPMorph()(scores(0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_it_is_a_module_without_state():
    morph = DPMorph("both", 5, {1: ("open", 3), 2: None}, footprint="cross")
    assert not list(morph.parameters())
    assert not morph.state_dict()
    x = scores(2, 4, 9, 9)
    for other in (pickle.loads(pickle.dumps(morph)), copy.deepcopy(morph)):
        assert torch.equal(other(x), morph(x))
        assert repr(other) == repr(morph)
    for setting in ("'opening_closing'", "size=5", "'opening', 3", "background=0", "'cross'"):
        assert setting in repr(morph)


@pytest.mark.parametrize("footprint", ["box", "ellipse"])
def test_torch_compile_takes_it_whole(footprint):
    morph = DPMorph("both", 3, {2: ("close", (5, 3))}, footprint=footprint)
    compiled = torch.compile(morph, backend="eager", fullgraph=True)
    fine, coarse = scores(2, 3, 9, 9).requires_grad_(), scores(2, 3, 5, 5)
    assert torch.equal(compiled(fine), morph(fine))
    (grad,) = torch.autograd.grad(compiled(fine).square().sum(), fine)
    (expected,) = torch.autograd.grad(morph(fine).square().sum(), fine)
    assert torch.equal(grad, expected)
    for ours, theirs in zip(compiled([fine, coarse]), morph([fine, coarse]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"operation": "opn"}, ValueError, "operation must be one of open, close, both"),
        ({"operation": 3}, TypeError, "operation must be a str"),
        ({"size": 0}, ValueError, "size must be >= 1"),
        ({"size": True}, TypeError, "size must be whole numbers"),
        ({"size": 2.5}, TypeError, "size must be a whole number"),
        ({"size": (3, 3, 3, 3)}, ValueError, "size must have 2 or 3 axes"),
        ({"footprint": "disk"}, ValueError, "footprint must be one of box, ellipse, cross"),
        ({"border": "constant"}, ValueError, "border must be one of"),
        ({"background": -1}, ValueError, "background must be >= 0"),
        ({"background": "0"}, TypeError, "background must be a channel's number"),
        ({"per_class": {-1: None}}, ValueError, "per_class must be >= 0"),
        ({"per_class": {"1": None}}, TypeError, "per_class must be a channel's number"),
        ({"per_class": {1: "open"}}, TypeError, r"per_class\[1\] must be \(operation, size\)"),
        ({"per_class": {1: ("open", 3, 3)}}, TypeError, r"per_class\[1\] must be"),
        ({"per_class": {1: ("opn", 3)}}, ValueError, "operation must be one of"),
        ({"per_class": []}, ValueError, "per_class must have a value for each channel"),
        ({"per_class": "open"}, TypeError, "per_class must be a mapping or a sequence"),
    ],
)
def test_bad_settings_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"DPMorph: {message}"):
        DPMorph(**arguments)


@pytest.mark.parametrize(
    ("morph", "x", "error", "message"),
    [
        (DPMorph(), scores(2, 3, 9), ValueError, "x must have shape"),
        (DPMorph(), torch.zeros(2, 3, 9, 9, dtype=torch.int64), TypeError, "x must be float64"),
        (DPMorph(), [], ValueError, "scores must hold a tensor"),
        (DPMorph(), [scores(1, 2, 8, 8), scores(1, 2, 4, 4, 4)], ValueError, "2 spatial axes"),
        (DPMorph(size=(3, 3)), scores(1, 2, 4, 4, 4), ValueError, "element must have 3 axes"),
        (DPMorph(per_class={3: None}), scores(1, 3, 8, 8), ValueError, "3 channels, got 4"),
        (DPMorph(per_class=[None, None]), scores(1, 3, 8, 8), ValueError, "3 channels, got 2"),
    ],
)
def test_scores_that_do_not_fit_are_refused(morph, x, error, message):
    with pytest.raises(error, match=f"DPMorph: .*{message}"):
        morph(x)


def test_sizes_from_anatomy_in_pixels_and_millimetres():
    morph = DPMorph.from_anatomy({1: 10.0, 3: 0.1}, kappa=0.5)
    assert morph.refinements(4) == (
        ("identity", 1),
        ("opening_closing", 5),
        ("identity", 1),
        ("opening_closing", 1),
    )
    morph = DPMorph.from_anatomy({1: 12.0}, spacing=(4.0, 1.0, 0.5), operation="open", kappa=0.25)
    assert morph.refinements(2)[1] == ("opening", (1, 3, 7))
    assert morph(scores(1, 2, 4, 8, 9)).shape == (1, 2, 4, 8, 9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"thickness": {}}, ValueError, "thickness must name a class"),
        ({"thickness": [3.0]}, TypeError, "thickness must be a mapping"),
        ({"thickness": {0: 3.0}}, ValueError, "must not name the background"),
        ({"thickness": {1: 0.0}}, ValueError, r"thickness\[1\] must be finite, > 0"),
        ({"thickness": {1: float("nan")}}, ValueError, r"thickness\[1\] must be finite"),
        ({"thickness": {1: "3"}}, TypeError, r"thickness\[1\] must be a number"),
        ({"thickness": {1: 9e5}}, ValueError, "less than 32768 pixels"),
        ({"thickness": {1: 3.0}, "spacing": 0.0}, ValueError, "spacing must be finite, > 0"),
        ({"thickness": {1: 3.0}, "spacing": (1.0,)}, ValueError, "spacing must have 2 or 3 axes"),
        ({"thickness": {1: 3.0}, "kappa": 1.5}, ValueError, "kappa must be finite, > 0 and <= 1"),
    ],
)
def test_nonsense_anatomy_is_refused(arguments, error, message):
    with pytest.raises(error, match=f"DPMorph.from_anatomy: .*{message}"):
        DPMorph.from_anatomy(**arguments)
