import torch

from dpfast import reference
from dpfast.morphology import OPERATIONS, PerChannel, apply

BORDERS = ("geodesic", "constant", "reflect", "mirror", "nearest", "wrap")


def twin_gradient(x, chains, grad):
    """Where the chains' sources send the gradient of the output."""
    total = torch.zeros_like(x, dtype=torch.float64).flatten(2)
    for sign, _, source in chains:
        kept = torch.where(source < 0, 0.0, sign * grad.double()).flatten(2)
        total.scatter_add_(2, source.clamp_min(0).flatten(2), kept)
    return total.reshape(x.shape)


def check_against_twin(x, operation, footprint, grad=None, *, size=None, **settings):
    """Values, with a gradient and without, and the gradient; NaN in the same places."""
    want, chains = reference.morphology(x, operation, footprint, **settings)
    given = {"size": size} if size is not None else {"footprint": footprint}
    plain = apply(x, operation, **given, **settings)
    traced = x.clone().requires_grad_()
    followed = apply(traced, operation, **given, **settings)
    assert plain.dtype == followed.dtype == x.dtype
    # Sums of a value and a height, and of two chains, are rounded to the input's dtype.
    limit = 0.0 if x.dtype == torch.float64 else {torch.float32: 2.0**-22}.get(x.dtype, 2.0**-7)
    for got in (plain, followed):
        torch.testing.assert_close(
            got.detach().double(), want, rtol=limit, atol=limit, equal_nan=True
        )
    assert torch.equal(plain.nan_to_num(1e9), followed.detach().nan_to_num(1e9))
    if operation == "identity":
        return
    grad = torch.randn(x.shape, dtype=torch.float64) if grad is None else grad
    grad = grad.to(x.dtype)
    followed.backward(grad)
    expected = twin_gradient(x, chains, grad)
    limit = {torch.float64: 1e-12, torch.float32: 1e-4}.get(x.dtype, 0.1)
    torch.testing.assert_close(traced.grad.double(), expected, rtol=limit, atol=limit)


__all__ = ["BORDERS", "OPERATIONS", "PerChannel", "check_against_twin", "twin_gradient"]
