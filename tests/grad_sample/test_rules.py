"""Every native rule against ordinary autograd on one sample at a time."""

import itertools
import math

import pytest
import torch
from torch import nn

import dpfast
from tests.grad_sample.helpers import (
    all_at_once,
    assert_close,
    assert_same_gradients,
    check,
    check_right_or_refused,
    energy,
    one_at_a_time,
    random,
    randomise,
)

# A GPU machine may lack Hypothesis; the other tests must still be collected there.
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
BATCH_SIZES = (0, 1, 7)

quick = settings(max_examples=15, deadline=None, derandomize=True)
few = settings(quick, max_examples=6)
batch_sizes = pytest.mark.parametrize("batch_size", BATCH_SIZES)
dtypes = st.sampled_from([torch.float64, torch.float32])
small = st.integers(1, 3)


class Both(nn.Module):
    """All outputs of a layer side by side, so that one loss depends on each of them."""

    def __init__(self, layer, *, batch_first=True, **told):
        super().__init__()
        self.layer = layer
        self.batch_first = batch_first
        self.told = told

    def forward(self, *inputs):
        if not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        out, *more = self.layer(*inputs, **self.told)
        out = out if self.batch_first else out.transpose(0, 1)
        return torch.cat([t.flatten(1) for t in (out, *more) if t is not None], 1)


def check_layer(layer, *inputs, dtype=torch.float64):
    """Per-sample gradients, the output and the gradients of the inputs."""
    randomise(layer).to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]

    def leaves():
        return [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]

    def loss_of(model, cotangent, *rows):
        return (model(*rows) * cotangent).flatten(1).sum(1)

    ordinary = leaves()
    expected = layer(*ordinary)
    cotangent = random(*expected.shape, seed=5, dtype=dtype)
    (expected * cotangent).sum().backward()
    truth = one_at_a_time(layer, loss_of, cotangent, *inputs)
    given = leaves()
    with dpfast.per_sample_gradients(layer) as grads:
        out = layer(*given)
        (out * cotangent).flatten(1).sum(1).sum().backward()
    assert_close(out, expected, "output")
    for x, y in zip(given, ordinary, strict=True):
        if x.requires_grad:
            assert_close(x.grad, y.grad, "input")
    assert_same_gradients(grads, truth)
    # A first layer's input needs no gradient.
    assert_same_gradients(all_at_once(layer, loss_of, cotangent, *inputs), truth)


# --- convolutions ---


@st.composite
def convolutions(draw, axes):
    """A convolution's settings and the spatial shape of its input."""

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, dilation = numbers(1, 3), numbers(1, 2)
    padding = draw(st.sampled_from(["valid", "same", numbers(0, 2), draw(st.integers(0, 2))]))
    groups = draw(small)
    # Large enough for the dilated kernel and for reflecting two elements.
    sizes = [
        max(3, d * (k - 1) + 1) + more
        for k, d, more in zip(kernel, dilation, numbers(0, 3), strict=True)
    ]
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": 1 if padding == "same" else numbers(1, 3),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
    }, sizes


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@batch_sizes
@pytest.mark.parametrize("axes", [1, 2, 3])
@quick
@given(data=st.data(), dtype=dtypes)
def test_convolution_equals_one_at_a_time(axes, batch_size, data, dtype):
    told, sizes = data.draw(convolutions(axes))
    layer = CONVOLUTIONS[axes - 1](**told)
    check_layer(layer, random(batch_size, told["in_channels"], *sizes), dtype=dtype)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", ["same", 2, (1, 2)])
def test_convolution_equals_one_at_a_time_for_every_padding(mode, padding):
    layer = nn.Conv2d(2, 3, (2, 4), padding=padding, dilation=(1, 2), padding_mode=mode)
    check_layer(layer, random(3, 2, 8, 9))


@st.composite
def transposed_convolutions(draw, axes):
    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups, kernel, dilation, stride = draw(small), numbers(1, 3), numbers(1, 2), numbers(1, 3)
    # No more padding than leaves an output of one element.
    padding = [
        min(p, d * (k - 1) // 2) for p, d, k in zip(numbers(0, 2), dilation, kernel, strict=True)
    ]
    extra = [min(e, max(s, d) - 1) for e, s, d in zip(numbers(0, 2), stride, dilation, strict=True)]
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "output_padding": extra,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }, numbers(1, 4)


@batch_sizes
@pytest.mark.parametrize("axes", [1, 2, 3])
@quick
@given(data=st.data(), dtype=dtypes)
def test_transposed_convolution_equals_one_at_a_time(axes, batch_size, data, dtype):
    told, sizes = data.draw(transposed_convolutions(axes))
    layer = TRANSPOSED[axes - 1](**told)
    check_layer(layer, random(batch_size, told["in_channels"], *sizes), dtype=dtype)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolution_takes_an_output_size(axes):
    class ToSize(nn.ConvTranspose2d if axes == 2 else TRANSPOSED[axes - 1]):
        def forward(self, x):
            return super().forward(x, output_size=[10] * axes)

    check_layer(ToSize(2, 3, 3, stride=2, padding=1), random(3, 2, *[5] * axes))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, stride=2)])
def test_convolution_equals_one_at_a_time_in_channels_last(layer):
    x = random(3, 4, 6, 7).to(memory_format=torch.channels_last)
    check(layer.double().to(memory_format=torch.channels_last), energy, x)


# --- linear ---


@batch_sizes
@quick
@given(
    between=st.lists(small, max_size=2), features=small, out=small, bias=st.booleans(), dtype=dtypes
)
def test_linear_equals_one_at_a_time(batch_size, between, features, out, bias, dtype):
    layer = nn.Linear(features, out, bias=bias)
    check_layer(layer, random(batch_size, *between, features), dtype=dtype)


# --- normalisation ---


@batch_sizes
@quick
@given(groups=small, per_group=small, sizes=st.lists(small, max_size=3), dtype=dtypes)
def test_group_norm_equals_one_at_a_time(batch_size, groups, per_group, sizes, dtype):
    # A group of one element is normalised to zero; its true gradient would be rounding noise.
    per_group = per_group + 1 if math.prod(sizes) == 1 else per_group
    layer = nn.GroupNorm(groups, groups * per_group)
    check_layer(layer, random(batch_size, groups * per_group, *sizes), dtype=dtype)


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("axes", [1, 2, 3])
@quick
@given(channels=small, size=st.integers(3, 5), eps=st.sampled_from([1e-5, 0.1]), dtype=dtypes)
def test_instance_norm_equals_one_at_a_time(axes, batch_size, channels, size, eps, dtype):
    layer = INSTANCE_NORMS[axes - 1](channels, eps=eps, affine=True)
    check_layer(layer, random(batch_size, channels, *[size] * axes), dtype=dtype)


# Ordinary autograd of torch 2.13 does not take an empty batch here.
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_instance_norm_of_an_empty_batch_has_empty_gradients(axes):
    layer = INSTANCE_NORMS[axes - 1](3, affine=True).double()
    grads = all_at_once(layer, energy, random(0, 3, *[4] * axes))
    assert {name: grad.shape for name, grad in grads.items()} == {"weight": (0, 3), "bias": (0, 3)}


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_instance_norm_in_eval_mode_equals_one_at_a_time_with_running_statistics(axes):
    layer = INSTANCE_NORMS[axes - 1](3, affine=True, track_running_stats=True).eval()
    layer.running_mean.copy_(torch.tensor([0.1, -0.4, 2.0]))
    layer.running_var.copy_(torch.tensor([0.3, 1.5, 2.0]))
    check_layer(layer, random(4, 3, *[3] * axes))


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_norm_equals_one_at_a_time_in_channels_last(layer):
    x = random(3, 4, 5, 6)
    # Ordinary autograd of torch 2.13 crashes in channels_last on a gradient that is not.
    truth = one_at_a_time(randomise(layer.double()), energy, x)
    grads = all_at_once(layer, energy, x.to(memory_format=torch.channels_last))
    assert_same_gradients(grads, truth)


@batch_sizes
@pytest.mark.parametrize("layer_class", [nn.LayerNorm, nn.RMSNorm])
@quick
@given(
    between=st.lists(small, max_size=2),
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    data=st.data(),
    dtype=dtypes,
)
def test_layer_and_rms_norm_equal_one_at_a_time(
    layer_class, batch_size, between, shape, data, dtype
):
    told = {"bias": data.draw(st.booleans())} if layer_class is nn.LayerNorm else {}
    layer = layer_class(shape, eps=data.draw(st.sampled_from([1e-5, 0.1])), **told)
    check_layer(layer, random(batch_size, *between, *shape), dtype=dtype)


# --- activation and embedding ---


@batch_sizes
@quick
@given(one=st.booleans(), channels=small, sizes=st.lists(small, max_size=3), dtype=dtypes)
def test_prelu_equals_one_at_a_time(batch_size, one, channels, sizes, dtype):
    layer = nn.PReLU(1 if one else channels)
    check_layer(layer, random(batch_size, channels, *sizes), dtype=dtype)


@batch_sizes
@quick
@given(
    shape=st.lists(small, max_size=2),
    padding_idx=st.sampled_from([None, 0, 2, -1]),
    width=small,
    seed=st.integers(0, 99),
    dtype=dtypes,
)
def test_embedding_equals_one_at_a_time(batch_size, shape, padding_idx, width, seed, dtype):
    layer = nn.Embedding(4, width, padding_idx=padding_idx)
    generator = torch.Generator().manual_seed(seed)
    check_layer(layer, torch.randint(0, 4, (batch_size, *shape), generator=generator), dtype=dtype)


def test_embedding_equals_one_at_a_time_for_int32_ids():
    check_layer(nn.Embedding(4, 3), torch.tensor([[0, 1], [1, 1], [3, 0]], dtype=torch.int32))


def test_embedding_without_its_padding_gets_other_gradients():
    ids = torch.tensor([[0, 1], [1, 1]])
    layer = nn.Embedding(3, 2, padding_idx=1).double()
    grads = all_at_once(layer, energy, ids)
    assert (grads["weight"][:, 1] == 0).all()
    assert (grads["weight"][0, 0] != 0).all()


# --- attention ---

ATTENTION = list(itertools.product([True, False], repeat=3))


@batch_sizes
@pytest.mark.parametrize(("batch_first", "need_weights", "cross"), ATTENTION)
@few
@given(
    length=small, other=small, heads=small, bias=st.booleans(), widths=st.booleans(), dtype=dtypes
)
def test_attention_equals_one_at_a_time(
    batch_size, batch_first, need_weights, cross, length, other, heads, bias, widths, dtype
):
    width = 2 * heads
    told = {"kdim": 3, "vdim": 5} if cross and widths else {}
    layer = nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first, **told)
    model = Both(layer, batch_first=batch_first, need_weights=need_weights)
    query = random(batch_size, length, width)
    key = random(batch_size, other, told.get("kdim", width), seed=2) if cross else query
    value = random(batch_size, other, told.get("vdim", width), seed=3) if cross else query
    check_layer(model, query, key, value, dtype=dtype)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_of_one_tensor_to_itself_equals_one_at_a_time(batch_first, need_weights):
    class ToItself(nn.MultiheadAttention):
        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            out, _ = super().forward(x, x, x, need_weights=need_weights)
            return out if batch_first else out.transpose(0, 1)

    check_layer(ToItself(6, 2, batch_first=batch_first), random(3, 4, 6))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_attention_equals_one_at_a_time_under_masks(batch_size):
    layer = nn.MultiheadAttention(6, 2, batch_first=True, add_zero_attn=True)
    causal = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    padding = torch.arange(4) > 1 + torch.arange(batch_size)[:, None] % 3

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, hidden):
            return self.layer(x, x, x, key_padding_mask=hidden, attn_mask=causal)[0]

    check_layer(Masked(), random(batch_size, 4, 6), padding)


@batch_sizes
@pytest.mark.parametrize("norm_first", [True, False])
@few
@given(length=small, heads=small, gelu=st.booleans(), dtype=dtypes)
def test_transformer_encoder_layer_equals_one_at_a_time(
    batch_size, norm_first, length, heads, gelu, dtype
):
    activation = "gelu" if gelu else "relu"
    layer = nn.TransformerEncoderLayer(
        4 * heads, heads, 7, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    check_layer(layer, random(batch_size, length, 4 * heads), dtype=dtype)


# A sequence length that the number of samples divides could be taken for windows.
@pytest.mark.parametrize(("batch_size", "length"), [(1, 3), (4, 3), (4, 4), (4, 8)])
def test_transformer_encoder_layer_with_samples_second_is_right_or_refused(batch_size, length):
    class SamplesSecond(nn.TransformerEncoderLayer):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    model = randomise(SamplesSecond(8, 2, 7, 0.0).double())
    check_right_or_refused(model, energy, random(batch_size, length, 8))


def test_transformer_decoder_layer_equals_one_at_a_time():
    layer = nn.TransformerDecoderLayer(8, 2, 7, 0.0, batch_first=True)
    check_layer(layer, random(3, 4, 8), random(3, 5, 8, seed=2))


# --- every layer ---

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 2, 3), (4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 3), (4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "layer": (lambda: nn.LayerNorm(4), (5, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_rule_equals_one_at_a_time_with_a_frozen_parameter(kind, frozen):
    build, shape = LAYERS[kind]
    layer = build()
    getattr(layer, frozen).requires_grad_(False)
    check_layer(layer, random(3, *shape))


# The sum of an instance norm's output has no gradient.
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "instance"])
def test_rule_equals_one_at_a_time_for_strided_inputs_and_expanded_gradients(kind):
    build, shape = LAYERS[kind]
    x = random(*shape, 6).movedim(-1, 0)[::2]
    check(randomise(build().double()), lambda model, rows: model(rows).flatten(1).sum(1), x)


@pytest.mark.parametrize("kind", [*LAYERS, "prelu", "rms"])
@pytest.mark.parametrize("windows", [1, 3])
def test_rule_sums_over_the_windows_of_a_sample(kind, windows):
    more = {"prelu": (lambda: nn.PReLU(4), (4, 5)), "rms": (lambda: nn.RMSNorm(4), (5, 4))}
    build, shape = {**LAYERS, **more}[kind]

    def loss_of(model, x):
        return energy(model, x.flatten(0, 1)).reshape(x.shape[:2]).sum(1)

    check(randomise(build().double()), loss_of, random(4, windows, *shape))
