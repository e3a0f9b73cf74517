"""The report of `alignment`: plain numbers in frozen dataclasses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["AlignmentReport", "NormBin", "RuleFigures", "Split", "SumFigures", "mean"]

# Two lines each: the table fits into 80 columns.
_HEADINGS = (
    "cos\nS,T", "sin\nS,T", "cos\nŜ,T", "pre-\ndicted", "clipped", "|S|\n/|T|", "SNR", "ESS"
)  # fmt: skip


@dataclass(frozen=True)
class SumFigures:
    """How a clipped sum S and the noisy one stand to the true sum T; None where it is 0 / 0.

    Attributes:
      cosine: cos(S, T).
      sine: sqrt(1 - cos(S, T)^2), the part of S that clipping turned away from T. Below 1e-7 it is
        rounding.
      norm_ratio: |S| / |T|.
      signal_to_noise: |S| / (z B sqrt(d)), for d coordinates and the rule's sensitivity B.
      noisy_cosine: cos(S + noise, T), measured with one draw of noise a batch.
      predicted_noisy_cosine: cos(S, T) / sqrt(1 + 1 / signal_to_noise^2). Where `noisy_cosine`
        keeps away from it, the noise has not the scale that it should have.
    """

    cosine: float | None
    sine: float | None
    norm_ratio: float | None
    signal_to_noise: float | None
    noisy_cosine: float | None
    predicted_noisy_cosine: float | None

    @classmethod
    def mean(cls, figures: Sequence[SumFigures]) -> SumFigures:
        """Each figure's mean over the batches where it is defined."""
        rows = [asdict(of_batch) for of_batch in figures]
        return cls(**{name: mean(row[name] for row in rows) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class RuleFigures:
    """What one clipping rule does.

    Attributes:
      sensitivity: B, by how much one unit can move the sum: max_grad_norm, or 1 for normalized.
      overall: mean over the batches, of all parameters together.
      groups: mean over the batches, of each layer group by itself.
      batches: of all parameters together, batch by batch.
      effective_units: ESS, (sum phi_i n_i)^2 / sum (phi_i n_i)^2, batch by batch.
      fraction_clipped: share of the units with phi_i < 1, over all batches.
      weight_quantiles: of phi_i over all batches, at the report's `quantile_levels`.
    """

    sensitivity: float
    overall: SumFigures
    groups: dict[str, SumFigures]
    batches: list[SumFigures]
    effective_units: list[float | None]
    fraction_clipped: float | None
    weight_quantiles: list[float]


@dataclass(frozen=True)
class NormBin:
    """Units of like norm: the smallest and the largest, how many, and their mean cos(g_i, T)."""

    smallest_norm: float
    largest_norm: float
    units: int
    mean_cosine: float | None


@dataclass(frozen=True)
class Split:
    """Units that show a class, or foreground of like size.

    Attributes:
      name: "class 0", ...; "no foreground", "foreground 1 of 3" (the smallest), ...
      units: how many.
      mean_norm: of n_i.
      mean_cosine: of cos(g_i, T).
      norm_share: their part of sum n_i.
      clipped_share: by rule, their part of sum phi_i n_i. Below `norm_share`, the rule takes weight
        from them.
    """

    name: str
    units: int
    mean_norm: float | None
    mean_cosine: float | None
    norm_share: float | None
    clipped_share: dict[str, float | None]


@dataclass(frozen=True)
class AlignmentReport:
    """What `alignment` found. Private data where `non_dp_diagnostics`: do not publish or log it.

    Figures of a sum are taken batch by batch, for a batch stands for a step. Figures of units
    (quantiles, shares, cos(g_i, T)) are taken over all units of all batches, each unit's cosine
    with the T of its own batch. Units with NaN or Inf have no part in any of them.

    Attributes:
      data: what the caller says of the probe: "synthetic", "public" or "private".
      non_dp_diagnostics: whether the figures were taken from private data, without any guarantee.
      max_grad_norm: C.
      noise_multiplier: z.
      units: privacy units with finite gradients, over all batches.
      nonfinite_units: units left out because of NaN or Inf.
      quantile_levels: of `norm_quantiles` and of the rules' `weight_quantiles`.
      norm_quantiles: of n_i; empty without units.
      diversity: |T|^2 / sum n_i^2, batch by batch: B where all gradients agree, 1 where they are
        orthogonal.
      cosine_by_norm: cos(g_i, T) over fifths of the units by norm.
      spearman: rank correlation of n_i and cos(g_i, T).
      classes: the units that show each class, where `foreground_of` was given.
      foreground_sizes: units without foreground, and thirds of the others by its size.
      rules: by name of the rule.
    """

    data: str
    non_dp_diagnostics: bool
    max_grad_norm: float
    noise_multiplier: float
    units: int
    nonfinite_units: int
    quantile_levels: list[float]
    norm_quantiles: list[float]
    diversity: list[float | None]
    cosine_by_norm: list[NormBin]
    spearman: float | None
    classes: list[Split]
    foreground_sizes: list[Split]
    rules: dict[str, RuleFigures]

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists and numbers that JSON can hold."""
        return asdict(self)

    def table(self) -> Table:
        """The rules side by side, each figure's mean over the batches."""
        mark = ", NOT PRIVATE" if self.non_dp_diagnostics else ""
        table = Table(
            title=f"Gradient alignment ({self.data} data{mark})",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("rule", no_wrap=True)
        for heading in _HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, rule in self.rules.items():
            found = rule.overall
            shares = (found.cosine, found.sine, found.noisy_cosine, found.predicted_noisy_cosine,
                      rule.fraction_clipped)  # fmt: skip
            sizes = (found.norm_ratio, found.signal_to_noise, mean(rule.effective_units))
            table.add_row(
                name, *(_text(s, ".3f") for s in shares), *(_text(s, ".3g") for s in sizes)
            )
        return table


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are defined; None where none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
