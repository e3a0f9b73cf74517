"""What the context refuses: samples that mix, losses that do, gradients that were missed."""

import pytest
import torch
from torch import nn

import dpfast
from dpfast import PrivacyError
from tests.grad_sample.helpers import (
    all_at_once,
    check_right_or_refused,
    energy,
    random,
    randomise,
)


def linear():
    return randomise(nn.Linear(3, 2).double())


class Applied(nn.Module):
    """A (4, 3) weight, a (4, 3) table and a linear layer, used by `use`."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.empty(3))
        self.tokens = nn.Parameter(torch.empty(4, 3))
        self.layer = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.table = nn.Embedding(4, 3)
        self.slope = nn.PReLU()
        self.register_buffer("ids", torch.arange(4))
        self.register_buffer("grid", random(4, 3, seed=3))

    def forward(self, x):
        rest = self.layer(x) * self.weight + self.norm(x) + self.slope(x) + self.tokens.mean()
        return self.use(self, rest + self.table.weight.sum())


def applied(use):
    return randomise(Applied(use)).double()


class Square(torch.autograd.Function):
    """Out of sight of the interception."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight.square()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight.square(), (2 * grad * x * weight).sum(0)


# --- layers ---


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_batchnorm_in_training_mode_is_refused_by_name(layer):
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), layer(3)))
    with pytest.raises(PrivacyError, match=r"1\.1 \(BatchNorm.*dpfast\.replace_batchnorm"):
        dpfast.per_sample_gradients(model)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()])
def test_batchnorm_as_the_model_is_refused(layer):
    with pytest.raises(PrivacyError, match=r"the model \(.*replace_batchnorm"):
        dpfast.per_sample_gradients(layer)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_is_refused_with_and_without_parameters(affine):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=affine))
    with pytest.raises(PrivacyError, match="replace_batchnorm"):
        dpfast.per_sample_gradients(model)


BATCH_NORMS = {
    "keyword": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "place": lambda x: nn.functional.batch_norm(x, None, None, None, None, True),
    "torch": lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
}


@pytest.mark.parametrize("call", BATCH_NORMS)
def test_functional_batchnorm_in_training_mode_is_refused(call):
    model = nn.Sequential(linear())
    with pytest.raises(PrivacyError, match=r"batch_norm.*dpfast\.replace_batchnorm"):
        all_at_once(model, lambda model, x: BATCH_NORMS[call](model(x)).sum(1), random(4, 3))


def test_module_set_to_training_mode_inside_the_context_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().eval()
    with pytest.raises(PrivacyError, match="replace_batchnorm"):
        all_at_once(model, lambda model, x: energy(model.train(), x), random(4, 3))


def test_instance_norm_with_running_statistics_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2, track_running_stats=True))
    with pytest.raises(PrivacyError, match=r"1 \(InstanceNorm2d\).*track_running_stats=False"):
        dpfast.per_sample_gradients(model)


def test_functional_instance_norm_with_running_statistics_is_refused():
    model = nn.Conv1d(2, 2, 1).double()
    mean, var = torch.zeros(2).double(), torch.ones(2).double()
    with pytest.raises(PrivacyError, match="running statistics"):
        all_at_once(
            model,
            lambda model, x: nn.functional.instance_norm(model(x), mean, var).flatten(1).sum(1),
            random(4, 2, 5),
        )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True}, "sparse"),
    ],
)
def test_embedding_option_is_refused(told, message):
    model = nn.Embedding(4, 3, **told).double()
    with pytest.raises(ValueError, match=f"weight must not .*{message}"):
        all_at_once(model, energy, torch.tensor([[0, 1], [2, 2]]))


UNBATCHED = [
    (nn.Linear(3, 2), (3,)),
    (nn.Conv1d(3, 2, 1), (3, 4)),
    (nn.ConvTranspose2d(3, 2, 1), (3, 4, 4)),
    (nn.LayerNorm((2, 3)), (2, 3)),
    (nn.RMSNorm((2, 3)), (2, 3)),
    (nn.PReLU(), (3,)),
]


@pytest.mark.parametrize(("layer", "shape"), UNBATCHED)
def test_input_without_a_sample_axis_is_refused(layer, shape):
    with pytest.raises((ValueError, PrivacyError), match="per_sample_gradients: weight"):
        all_at_once(layer.double(), lambda model, x: model(x).sum().reshape(1), random(*shape))


def test_attention_without_a_sample_axis_is_refused():
    model = nn.MultiheadAttention(4, 2).double()
    x = random(3, 4)
    with pytest.raises(ValueError, match="multi-head attention needs inputs with a sample axis"):
        all_at_once(model, lambda model, x: model(x, x, x)[0].sum(1), x)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_attention_with_a_bias_among_the_keys_is_right_or_refused(batch_size):
    class ToItself(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = ToItself(4, 2, add_bias_kv=True, batch_first=True).double()
    check_right_or_refused(model, energy, random(batch_size, 3, 4))


def test_recurrent_layers_are_refused():
    model = nn.LSTM(3, 2, batch_first=True).double()
    with pytest.raises(NotImplementedError, match=r"weight_ih_l0.*has no rule"):
        all_at_once(model, lambda model, x: model(x)[0].flatten(1).sum(1), random(2, 4, 3))


# --- losses ---

LOSSES = {
    "mean": lambda losses: losses.mean(),
    "scaled sum": lambda losses: losses.sum() / 4,
    "norm": lambda losses: losses.norm(),
    "one of them": lambda losses: losses[0],
    "(B, K)": lambda losses: losses[:, None].expand(4, 2),
    "sum of (B, K)": lambda losses: losses[:, None].expand(4, 2).sum(),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_that_is_not_one_number_a_sample_is_refused(kind):
    model = linear()
    with dpfast.per_sample_gradients(model):
        loss = LOSSES[kind](energy(model, random(4, 3)))
        with pytest.raises(PrivacyError, match=r"per-sample loss of shape \(B,\) or its sum"):
            loss.backward(torch.ones_like(loss))
        energy(model, random(4, 3)).backward()
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("take", [lambda out: out.flatten(), lambda out: out.flatten()[:5]])
def test_loss_whose_length_is_not_the_number_of_samples_is_refused(take):
    with pytest.raises(PrivacyError, match="does not divide into"):
        all_at_once(linear(), lambda model, x: take(model(x)), random(4, 3))


def test_input_whose_rows_do_not_divide_into_the_samples_is_refused():
    def loss_of(model, x):
        return model(torch.cat([x, x[:1]]))[:4].sum(1)

    with pytest.raises(PrivacyError, match="5 rows, which does not divide into 4 samples"):
        all_at_once(linear(), loss_of, random(4, 3))


@pytest.mark.parametrize("second", [2, 1, 0])
def test_losses_of_different_lengths_in_one_context_are_refused(second):
    model = linear()
    with dpfast.per_sample_gradients(model):
        energy(model, random(4, 3)).sum().backward()
        loss = energy(model, random(second, 3)).sum()
        with pytest.raises(PrivacyError, match=f"same length, got 4 and {second}"):
            loss.backward()


def test_create_graph_is_refused():
    model = linear()
    with (
        pytest.raises(ValueError, match="create_graph"),
        dpfast.per_sample_gradients(model),
    ):
        energy(model, random(4, 3)).sum().backward(create_graph=True)


@pytest.mark.parametrize("walk", [torch.autograd.backward, torch.autograd.grad])
def test_backward_past_the_loss_is_refused(walk):
    model = linear()
    told = [[model.weight]] if walk is torch.autograd.grad else []
    with (
        pytest.raises((PrivacyError, NotImplementedError), match="per_sample_gradients: "),
        dpfast.per_sample_gradients(model),
    ):
        walk([energy(model, random(4, 3)).sum()], *told)


# --- the context ---


def test_context_without_backward_is_refused():
    model = linear()
    with (
        pytest.raises(RuntimeError, match="before backward was called"),
        dpfast.per_sample_gradients(model),
    ):
        energy(model, random(4, 3))


def test_gradients_before_backward_are_refused():
    model = linear()
    grads = dpfast.per_sample_gradients(model)
    with pytest.raises(RuntimeError, match="before backward was called"):
        grads["weight"]


def test_context_entered_twice_is_refused():
    model = linear()
    grads = all_at_once(model, energy, random(4, 3))
    with pytest.raises(RuntimeError, match="entered twice"):
        grads.__enter__()


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="must have a parameter that requires grad"):
        dpfast.per_sample_gradients(linear().requires_grad_(False))


def test_error_inside_the_context_is_passed_on():
    with pytest.raises(KeyError, match="mine"), dpfast.per_sample_gradients(linear()):
        raise KeyError("mine")


def test_unknown_name_is_a_key_error():
    grads = all_at_once(linear(), energy, random(4, 3))
    with pytest.raises(KeyError, match="nothing"):
        grads["nothing"]


# --- parameters that were missed ---


def test_parameter_that_took_no_part_is_refused():
    model = nn.ModuleList([linear(), linear()])
    with pytest.raises(PrivacyError, match=r"1\.weight .*requires_grad_\(False\)"):
        all_at_once(model, lambda model, x: energy(model[0], x), random(4, 3))


@pytest.mark.parametrize("with_grad", [False, True])
def test_parameter_in_a_custom_function_is_refused(with_grad):
    model = applied(lambda m, x: Square.apply(x, m.weight))
    if with_grad:
        model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(PrivacyError, match="weight got a gradient that mixes the samples"):
        all_at_once(model, energy, random(4, 3))


def test_computed_parameter_in_a_custom_function_is_refused():
    model = applied(lambda m, x: Square.apply(x, m.weight * 2))
    with pytest.raises(PrivacyError, match="weight"):
        all_at_once(model, energy, random(4, 3))


# Tensors that belong to no sample, of four rows: they could be taken for those of 1, 2 or 4.
NOT_OF_SAMPLES = {
    "linear of a parameter": lambda m, x: x + m.layer(m.tokens).sum(0),
    "linear of a computed one": lambda m, x: x + m.layer(m.tokens * 2).square().sum(0),
    "linear of a buffer": lambda m, x: x + m.layer(m.grid).square().sum(0),
    "norm of a parameter": lambda m, x: x + m.norm(m.tokens).square().sum(0),
    "norm of a computed one": lambda m, x: x + m.norm(m.tokens.exp()).square().sum(0),
    "activation of a parameter": lambda m, x: x + m.slope(m.tokens).sum(0),
    "activation of a computed one": lambda m, x: x + m.slope(m.tokens * 2).sum(0),
    "embedding of a buffer": lambda m, x: x + m.table(m.ids).square().sum(0),
    "embedding of a range": lambda m, x: x + m.table(torch.arange(4)).square().sum(0),
    "linear of a constant": lambda m, x: x + m.layer(torch.ones(4, 3).double()).sum(0),
    "generic of a constant": lambda m, x: x + (m.weight * torch.ones(4, 3).double()).sum(0),
}


@pytest.mark.parametrize("use", NOT_OF_SAMPLES)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_layer_on_what_belongs_to_no_sample_is_right_or_refused(use, batch_size):
    check_right_or_refused(applied(NOT_OF_SAMPLES[use]), energy, random(batch_size, 3))


@pytest.mark.parametrize("frozen", ["layer", "slope", "norm"])
def test_frozen_layer_on_a_parameter_is_right_or_refused(frozen):
    model = applied(lambda m, x: x + getattr(m, frozen)(m.tokens * 2).square().sum(0))
    getattr(model, frozen).requires_grad_(False)
    check_right_or_refused(model, energy, random(4, 3))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_class_token_is_right_or_refused(batch_size):
    class ClassToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.empty(1, 1, 3))
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            token = self.token.expand(len(x), -1, -1)
            return self.layer(torch.cat([token, x], 1))

    check_right_or_refused(randomise(ClassToken().double()), energy, random(batch_size, 4, 3))
