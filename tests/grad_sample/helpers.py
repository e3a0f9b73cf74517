"""The truth about per-sample gradients, one sample at a time, and the comparison with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import dpfast
from dpfast import PrivacyError
from dpfast.grad_sample import _routes
from dpfast.grad_sample.planner import Route

# Relative to the largest true value of a parameter: rounding of sums over a sample's positions,
# taken in another order, which a few layers of a network multiply.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# A bias before an instance norm has a true gradient of rounding noise.
SMALLEST_SCALE = 1e-6

# Called with a model and rows of the batch; returns one loss per row.
LossOf = Callable[..., torch.Tensor]


def one_at_a_time(
    model: nn.Module, loss_of: LossOf, *batch: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients (B, *shape) of the trainable parameters by ordinary autograd on single samples."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for sample in range(len(batch[0])):
        model.zero_grad()
        loss_of(model, *(rows[sample : sample + 1] for rows in batch)).sum().backward()
        for name, param in params.items():
            assert param.grad is not None, f"{name} takes no part"
            found[name].append(param.grad.clone())
    model.zero_grad()
    return {
        name: torch.stack(found[name]) if found[name] else param.new_zeros((0, *param.shape))
        for name, param in params.items()
    }


def all_at_once(
    model: nn.Module, loss_of: LossOf, *batch: torch.Tensor
) -> dpfast.PerSampleGradients:
    """The same by the package."""
    with dpfast.per_sample_gradients(model) as grads:
        loss_of(model, *batch).sum().backward()
    return grads


def assert_close(
    got: torch.Tensor, expected: torch.Tensor, name: str = "", tolerance: float | None = None
) -> None:
    """Equal in shape, dtype and, up to the tolerance, in value; NaN never is."""
    assert got.shape == expected.shape, f"{name}: shape"
    assert got.dtype == expected.dtype, f"{name}: dtype"
    if not expected.numel():
        return
    got, expected = got.detach(), expected.detach()
    scale = max(float(expected.abs().max()), SMALLEST_SCALE)
    error = float((got - expected).abs().max()) / scale
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    assert error <= limit, f"{name}: {error:.2g} of the largest value, {limit:.2g} allowed"


def assert_same_gradients(
    grads: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
    tolerance: float | None = None,
) -> None:
    """Same names in the same order, same gradients."""
    assert list(grads) == list(truth)
    for name, expected in truth.items():
        assert_close(grads[name], expected, name, tolerance)


def check(
    model: nn.Module, loss_of: LossOf, *batch: torch.Tensor, tolerance: float | None = None
) -> None:
    """All at once equals one at a time, and `.grad` stays None."""
    truth = one_at_a_time(model, loss_of, *batch)
    grads = all_at_once(model, loss_of, *batch)
    assert_same_gradients(grads, truth, tolerance)
    assert all(param.grad is None for param in model.parameters())


def check_right_or_refused(model: nn.Module, loss_of: LossOf, *batch: torch.Tensor) -> None:
    """For what is not promised: an error of the package's own, but never wrong gradients."""
    try:
        grads = all_at_once(model, loss_of, *batch)
    except (PrivacyError, NotImplementedError, ValueError) as error:
        if "per_sample_gradients: " not in str(error):
            raise
        return
    model.zero_grad()
    assert_same_gradients(grads, one_at_a_time(model, loss_of, *batch))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: also the scales and shifts that start as ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    return model


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def energy(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A loss of shape (rows,) that depends on every output, not linearly."""
    return (model(x).flatten(1) - 0.3).square().mean(1)


# --- routes ---


@contextmanager
def forced(route: Route) -> Iterator[list[Route]]:
    """Every layer that can goes this way, whatever it costs; the others keep. Yields who went."""
    taken: list[Route] = []

    def choose(costs: Mapping[Route, Any]) -> Route:
        taken.append(route if route in costs else Route.KEEP)
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_routes, "fastest", choose)
        yield taken


def by_route(
    route: Route, model: nn.Module, loss_of: LossOf, *batch: torch.Tensor
) -> dpfast.PerSampleGradients:
    """All at once, every layer forced down one route."""
    with forced(route) as taken:
        grads = all_at_once(model, loss_of, *batch)
    assert route in taken, f"no layer can {route.value}"
    assert {layer.route for layer in grads.plan.layers} <= {route, Route.KEEP}
    return grads


def clipped_sum(grads: Any, **settings: Any) -> Any:
    """clip_and_noise without noise, unless the settings say otherwise."""
    plain = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "mechanism": "none"}
    return dpfast.clip_and_noise(grads, **{**plain, **settings})


def norms_of(grads: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B,) float64 over all parameters."""
    return torch.cat([grad.detach().double().flatten(1) for grad in grads.values()], 1).norm(dim=1)


def mixed_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Layers of every kind that can defer, and some that cannot; input (B, 2, 5, 5)."""
    return randomise(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
            nn.Tanh(),
            nn.Conv2d(3, 2, 3, stride=2, dilation=2),
            nn.Flatten(2),
            nn.Linear(9, 5),
            nn.PReLU(),
            nn.Linear(5, 3, bias=False),
        )
    ).to(dtype)


def mixed_batch(batch_size: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Images for mixed_net."""
    return random(batch_size, 2, 5, 5, dtype=dtype)


def sizes_of(batch_size: int) -> torch.Tensor:
    """What scaled_energy multiplies each sample's loss by."""
    return torch.tensor([10.0**k for k in range(-2, batch_size - 2)], dtype=torch.float64)


def scaled_energy(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The energy of samples that weigh more from one to the next, so that norms differ widely."""
    return energy(model, x).double() * sizes_of(len(x))


def step(
    model: nn.Module, x: torch.Tensor, budget: float, loss_of: LossOf = energy
) -> dpfast.PerSampleGradients:
    """The gradients of one step under a memory budget."""
    with dpfast.per_sample_gradients(model, memory_budget=budget) as grads:
        loss_of(model, x).sum().backward()
    return grads


def wide_net() -> nn.Module:
    """Weights that outweigh the activations: gradients kept cost much."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64)
    )


DEFERRING = (Route.RECOMPUTE, Route.GHOST)
# Sums over samples and positions in one order or another; the weights agree to 2^-28.
SUM_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def assert_same_sums(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tolerance: float | None = None,
) -> None:
    """Same names in the same order, same clipped sums."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        limit = SUM_TOLERANCE[value.dtype] if tolerance is None else tolerance
        assert_close(found[name], value, name, limit)


def check_routes(
    model: nn.Module,
    loss_of: LossOf,
    *batch: torch.Tensor,
    tolerance: float | None = None,
    routes: Sequence[Route] = DEFERRING,
) -> None:
    """Both deferring routes against KEEP, clipped at the median norm."""
    kept = by_route(Route.KEEP, model, loss_of, *batch)
    bound = float(norms_of(kept).median())
    expected = clipped_sum(kept, max_grad_norm=bound)
    # A sum of zeros would prove nothing.
    assert norms_of({name: value[None] for name, value in expected.items()}) > 0.1 * bound
    for route in routes:
        found = clipped_sum(by_route(route, model, loss_of, *batch), max_grad_norm=bound)
        assert_same_sums(found, expected, tolerance)
