"""The figures of `alignment` from sums, norms and weights, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dpfast.privacy.diagnostics.report import NormBin, Split, SumFigures

__all__ = [
    "QUANTILE_LEVELS",
    "Units",
    "cosines_by_norm",
    "effective_number",
    "inner_products",
    "mean_of",
    "quantiles",
    "ratio",
    "row_products",
    "spearman",
    "splits_by_class",
    "splits_by_size",
    "sum_figures",
]

QUANTILE_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_NORM_BINS = 5
_SIZE_BINS = 3

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Units:
    """What is known of units, one entry each: on the CPU, float64.

    Attributes:
      norms: n_i, finite, (U,).
      cosines: cos(g_i, T), NaN where n_i or T is 0, (U,).
      weights: phi_i by rule, (U,).
      foreground: how much of each class a unit shows, (U, classes); None where it is not known.
    """

    norms: torch.Tensor
    cosines: torch.Tensor
    weights: dict[str, torch.Tensor]
    foreground: torch.Tensor | None

    @classmethod
    def joined(cls, parts: Sequence[Units]) -> Units:
        """The units of all batches."""
        known = [part.foreground for part in parts if part.foreground is not None]
        return cls(
            torch.cat([part.norms for part in parts]),
            torch.cat([part.cosines for part in parts]),
            {rule: torch.cat([p.weights[rule] for p in parts]) for rule in parts[0].weights},
            torch.cat(known) if known else None,
        )


def inner_products(left: Tensors, right: Tensors) -> torch.Tensor:
    """Of each parameter's two tensors, (parameters,), on the CPU."""
    products = [
        torch.dot(value.reshape(-1).double(), right[name].reshape(-1).double()).cpu()
        for name, value in left.items()
    ]
    return torch.stack(products)


def row_products(grads: Tensors, total: Tensors, num_rows: int) -> torch.Tensor:
    """g_b . T of every row, (B,), on the CPU; one row of one parameter is widened at a time."""
    products = torch.zeros(num_rows, dtype=torch.float64)
    if not num_rows:
        return products
    for name, value in total.items():
        direction = value.reshape(-1).double()
        rows = grads[name].unbind()
        found = [torch.dot(row.reshape(-1).double(), direction) for row in rows]
        products += torch.stack(found).cpu()
    return products


def sum_figures(products: torch.Tensor, dimension: int, noise_scale: float) -> SumFigures:
    """The figures of one clipped sum.

    Args:
      products: S.S, S.T, S'.S', S'.T and T.T, for the noisy sum S'.
      dimension: d, the number of coordinates.
      noise_scale: z B, the standard deviation of the noise.
    """
    clipped, clipped_total, noisy, noisy_total, total = products.tolist()
    cosine = _cosine(clipped_total, clipped, total)
    noise_norm = noise_scale * math.sqrt(dimension)
    signal_to_noise = ratio(math.sqrt(clipped), noise_norm)
    predicted = None
    if cosine is not None:
        # The same as 1 / sqrt(1 + 1 / SNR^2), for an SNR of any size.
        predicted = cosine * math.sqrt(clipped) / math.hypot(math.sqrt(clipped), noise_norm)
    return SumFigures(
        cosine=cosine,
        sine=None if cosine is None else math.sqrt((1.0 - cosine) * (1.0 + cosine)),
        norm_ratio=ratio(math.sqrt(clipped), math.sqrt(total)),
        signal_to_noise=signal_to_noise,
        noisy_cosine=_cosine(noisy_total, noisy, total),
        predicted_noisy_cosine=predicted,
    )


def _cosine(product: float, left_square: float, right_square: float) -> float | None:
    # One root of the product: of a vector with itself it is exactly 1.
    value = ratio(product, math.sqrt(left_square * right_square))
    return None if value is None else min(1.0, max(-1.0, value))


def ratio(numerator: float, denominator: float) -> float | None:
    """None where it is no finite number, as 0 / 0 is."""
    value = numerator / denominator if denominator else math.nan
    return value if math.isfinite(value) else None


def mean_of(values: torch.Tensor) -> float | None:
    """Mean of what is no NaN."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def quantiles(values: torch.Tensor) -> list[float]:
    """At QUANTILE_LEVELS, linear between ranks; none of nothing."""
    if not len(values):
        return []
    found: list[float] = values.quantile(values.new_tensor(QUANTILE_LEVELS)).tolist()
    return found


def effective_number(contributions: torch.Tensor) -> float | None:
    """(sum c)^2 / sum c^2: of how many equal parts the sum might be made."""
    return ratio(float(contributions.sum()) ** 2, float(contributions.square().sum()))


def spearman(left: torch.Tensor, right: torch.Tensor) -> float | None:
    """Rank correlation, ties at their mean rank; None for less than two different values."""
    a, b = (_ranks(values) - (len(values) + 1) / 2 for values in (left, right))
    return _cosine(float(a @ b), float(a @ a), float(b @ b))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: torch.Tensor = (counts.cumsum(0) - (counts - 1).double() / 2)[place]
    return ranks


def _bins(values: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Masks of about equally many values from small to large; equal values stay together."""
    if not len(values):
        return []
    edges = values.quantile(torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:-1])
    place = torch.bucketize(values, edges)
    masks = [place == index for index in range(count)]
    return [mask for mask in masks if mask.any()]


def cosines_by_norm(units: Units) -> list[NormBin]:
    """cos(g_i, T) over fifths of the units by norm."""
    return [
        NormBin(
            smallest_norm=float(units.norms[mask].min()),
            largest_norm=float(units.norms[mask].max()),
            units=int(mask.sum()),
            mean_cosine=mean_of(units.cosines[mask]),
        )
        for mask in _bins(units.norms, _NORM_BINS)
    ]


def splits_by_class(units: Units) -> list[Split]:
    """The units that show each class."""
    if units.foreground is None:
        return []
    shown = units.foreground > 0
    return [_split(f"class {k}", units, shown[:, k]) for k in range(shown.shape[1])]


def splits_by_size(units: Units) -> list[Split]:
    """The units without foreground, and thirds of the others."""
    if units.foreground is None:
        return []
    size = units.foreground.sum(1)
    some = size > 0
    bins = _bins(size[some], _SIZE_BINS)
    splits = [_split("no foreground", units, ~some)]
    for index, within in enumerate(bins):
        mask = torch.zeros_like(some).masked_scatter_(some, within)
        splits.append(_split(f"foreground {index + 1} of {len(bins)}", units, mask))
    return splits


def _split(name: str, units: Units, mask: torch.Tensor) -> Split:
    def share(values: torch.Tensor) -> float | None:
        return ratio(float(values[mask].sum()), float(values.sum()))

    return Split(
        name=name,
        units=int(mask.sum()),
        mean_norm=mean_of(units.norms[mask]),
        mean_cosine=mean_of(units.cosines[mask]),
        norm_share=share(units.norms),
        clipped_share={rule: share(phi * units.norms) for rule, phi in units.weights.items()},
    )
