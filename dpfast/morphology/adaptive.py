"""Sizes of the elements from the masks themselves: privately, or as the paper has it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Protocol

import dp_accounting
import torch

from dpfast import _validate
from dpfast.errors import PrivacyError
from dpfast.morphology.dp_morph import DPMorph, check_operation, nearest_odd
from dpfast.morphology.label_maps import check_label_map, check_num_classes, thickness
from dpfast.ops import Guarantee, NoiseSource, clip_and_noise
from dpfast.privacy import PrivacyLedger
from dpfast.privacy.units import find_units

__all__ = ["AdaptedMorph", "LabelMaps", "adapt", "adapt_nonprivate"]

_LARGEST_ERROR = 0.5  # octaves, of the noise in a class's mean; beyond it the size says nothing
_MOST_OCTAVES = 15.0  # 32768 pixels, the largest element


class LabelMaps(Protocol):
    """Label maps by number: a tensor, a list of tensors, or what reads them one at a time."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Any:
        """The mask with a number, (*spatial) or (1, *spatial)."""


@dataclass(frozen=True)
class AdaptedMorph:
    """Elements that were measured, and what the measurement guarantees.

    Attributes:
      morph: the module to put between scores and loss.
      sizes: the element's size for each foreground class.
      fell_back: the classes that have their fixed size, as the noisy numbers say too little.
      noisy_counts: patients with each of the classes, as released, noise included; None where
        nothing was released privately.
      guarantee: of the measurement.
    """

    morph: DPMorph
    sizes: dict[int, int]
    fell_back: tuple[int, ...]
    noisy_counts: dict[int, float] | None
    guarantee: Guarantee


@dataclass(frozen=True)
class _Plan:
    """What is public about a measurement, checked."""

    function: str
    num_classes: int
    operations: list[str]
    fixed_sizes: list[int]
    kappa: float
    footprint: str
    border: str

    @property
    def num_foreground(self) -> int:
        """Classes that are measured."""
        return self.num_classes - 1

    def build(self, sizes: Sequence[int]) -> DPMorph:
        """The module with these sizes."""
        return DPMorph(
            per_class=[None, *zip(self.operations, sizes, strict=True)],
            footprint=self.footprint,
            border=self.border,
        )

    def result(
        self,
        thicknesses: Sequence[float | None],
        counts: Sequence[float] | None,
        guarantee: Guarantee,
    ) -> AdaptedMorph:
        """The result for classes of these thicknesses, None where there is none."""
        sizes = [
            fixed if value is None else nearest_odd(self.kappa * value)
            for value, fixed in zip(thicknesses, self.fixed_sizes, strict=True)
        ]
        return AdaptedMorph(
            morph=self.build(sizes),
            sizes=dict(enumerate(sizes, start=1)),
            fell_back=tuple(c for c, value in enumerate(thicknesses, start=1) if value is None),
            noisy_counts=None if counts is None else dict(enumerate(counts, start=1)),
            guarantee=guarantee,
        )

    def description(self) -> dict[str, Any]:
        """For the ledger; JSON-able."""
        return {
            "num_classes": self.num_classes,
            "operations": self.operations,
            "fixed_sizes": self.fixed_sizes,
            "kappa": self.kappa,
            "footprint": self.footprint,
            "border": self.border,
        }


def adapt(
    masks: LabelMaps,
    patient_ids: Iterable[Hashable],
    *,
    num_classes: int,
    noise_multiplier: float,
    ledger: PrivacyLedger,
    fixed_size: int | Mapping[int, int] = 3,
    operation: str | Mapping[int, str] = "both",
    kappa: float = 0.5,
    max_octaves: float = 6.0,
    footprint: str = "box",
    border: str = "geodesic",
    noise: NoiseSource | None = None,
) -> AdaptedMorph:
    """Measure how thick each class is, under differential privacy, and choose sizes from it.

    For patient p and class c let t_pc be clip(log2(thickness), 0, L) / L, the median over those
    of the patient's masks that hold the class; the thickness is the side, in pixels, of the largest
    box that fits in the class's region. Released is, for all classes, the sum over patients of
    (t_pc - 1/2, 1) where the patient has the class and (0, 0) where not, with Gaussian noise. The
    size is the odd number nearest to kappa * 2^(L t), t being 1/2 plus the ratio of the two noisy
    sums, kept within [0, 1].

    Measure before `PrivacyEngine.make_private_with_epsilon`, whose target covers what the ledger
    holds by then. In data-parallel training the first process measures and shares the sizes.

    Args:
      masks: the training masks, class numbers with the background 0: a tensor (N, *spatial) or
        (N, 1, *spatial), or anything with a length and an index that gives (*spatial) or
        (1, *spatial), of any sizes; bool or integers.
      patient_ids: an int or str for each mask. The number of patients counts as public.
      num_classes: background included.
      noise_multiplier: z_h, standard deviation of the noise over the sensitivity, > 0.
      ledger: of the training that follows; give it to PrivacyEngine, too.
      fixed_size: public, for classes that too few patients have; one number, or one per class.
      operation: as in `DPMorph`, for all classes or by class.
      kappa: public, size over thickness, 0 < kappa <= 1.
      max_octaves: L, public: thicknesses beyond 2^L pixels count as that.
      footprint: see `DPMorph`, as border.
      border: of the image.
      noise: of which the noise is drawn; None: keyed by the operating system. A seeded source
        makes epsilon infinite.

    Returns:
      The module and what was released; nothing in it depends on the masks but through the noise.
      A class falls back to its fixed size where L z_h sensitivity / noisy count, the noise in its
      mean, exceeds half an octave, or the noisy count is not positive.

    Raises:
      TypeError, ValueError: a bad argument, or masks that are no label maps, of which the message
        says no more. PrivacyError: a ledger that takes no entries, or of another unit. In all
        these cases nothing is spent or released; with a bad argument or ledger no mask is read.

    Guarantees:
      One Gaussian mechanism on patients (add/remove): one patient moves the sum by at most
      sqrt(1.25 K) in L2, K = num_classes - 1, which clipping enforces. It is in the ledger before
      its noise is drawn. Together with private training it costs the composition of both.

    References:
      arXiv:2606.21763 measures without privacy; see `adapt_nonprivate`.
    """
    name = "adapt"
    plan = _check_plan(
        name, num_classes, operation, fixed_size, kappa, footprint=footprint, border=border
    )
    multiplier = _validate.number(
        name, "noise_multiplier", noise_multiplier, minimum=0.0, maximum=1e6, exclusive=True
    )
    octaves = _validate.number(
        name, "max_octaves", max_octaves, minimum=0.0, maximum=_MOST_OCTAVES, exclusive=True
    )
    if noise is not None and not isinstance(noise, NoiseSource):
        raise TypeError(f"{name}: noise must be a NoiseSource, got {type(noise).__name__}")
    _check_masks(name, masks)
    _check_ledger(name, ledger)
    if isinstance(patient_ids, str):
        raise TypeError(f"{name}: patient_ids must be one id for each mask, got a str")
    ids = list(patient_ids)
    if len(ids) != len(masks):
        raise ValueError(
            f"{name}: patient_ids must hold one id for each of the {len(masks)} masks, got "
            f"{len(ids)}"
        )
    units = find_units(masks, "patient", ids)
    if ledger.privacy_unit not in (None, units.name):
        raise PrivacyError(
            f"{name}: ledger must count patients, got one whose privacy_unit is "
            f"{ledger.privacy_unit!r}: epsilons of different units do not add up"
        )
    sensitivity = math.sqrt(1.25 * plan.num_foreground)
    secure = noise is None or noise.secure
    mechanism = ledger.register(
        dp_accounting.GaussianDpEvent(multiplier),
        privacy_unit=units.name,
        description={
            "release": "thickness of each class",
            "protects": units.statement,
            "mechanism": "gaussian",
            "noise_multiplier": multiplier,
            "sensitivity": sensitivity,
            "num_units": units.num_units,
            **plan.description(),
            "max_octaves": octaves,
            "noise_source": "operating system" if secure else "seeded",
            "arithmetic": "floating point; the guarantee is one of real arithmetic",
        },
        reasons=[] if secure else ["seeded noise: who knows the seed can remove it"],
    )
    rows = torch.stack(
        [
            _row(plan, (masks[int(entry)] for entry in units.entries(unit)), octaves)
            for unit in range(units.num_units)
        ]
    )
    ledger.record(mechanism)
    released, stats = clip_and_noise(
        rows,
        max_grad_norm=sensitivity,
        noise_multiplier=multiplier,
        norm="l2",
        noise=noise,
        return_stats=True,
    )
    # From here on everything follows from what was released and from public numbers.
    centred, counts = released.reshape(2, -1).tolist()
    thicknesses: list[float | None] = []
    for total, count in zip(centred, counts, strict=True):
        if count <= 0.0 or octaves * multiplier * sensitivity / count > _LARGEST_ERROR:
            thicknesses.append(None)
        else:
            thicknesses.append(2.0 ** (octaves * min(max(0.5 + total / count, 0.0), 1.0)))
    return plan.result(thicknesses, counts, stats.guarantee)


def adapt_nonprivate(
    masks: LabelMaps,
    *,
    num_classes: int,
    ledger: PrivacyLedger,
    fixed_size: int | Mapping[int, int] = 3,
    operation: str | Mapping[int, str] = "both",
    kappa: float = 0.5,
    footprint: str = "box",
    border: str = "geodesic",
) -> AdaptedMorph:
    """Sizes from the plain mean thickness of each class: without privacy, for comparison.

    The ledger's epsilon is infinite from here on.

    Args:
      masks: see `adapt`, as for all other arguments.
      num_classes: background included.
      ledger: which notes that private data was used outside any mechanism.
      fixed_size: for classes that no mask has.
      operation: for all classes or by class.
      kappa: size over thickness.
      footprint: see `DPMorph`, as border.
      border: of the image.

    Returns:
      As `adapt`, with no counts and no guarantee.

    Raises:
      TypeError, ValueError: as `adapt`. PrivacyError: a ledger that takes no entries.
    """
    name = "adapt_nonprivate"
    plan = _check_plan(
        name, num_classes, operation, fixed_size, kappa, footprint=footprint, border=border
    )
    _check_masks(name, masks)
    _check_ledger(name, ledger)
    reason = "adapt_nonprivate: element sizes are taken from private masks without noise"
    ledger.mark_non_private(reason)
    limit = int(2**_MOST_OCTAVES)
    found = [
        thickness(check_label_map(name, masks[index], num_classes), num_classes, limit)
        for index in range(len(masks))
    ]
    present = [[side for side in sides if side] for sides in zip(*found, strict=True)]
    guarantee = Guarantee(
        holds=False,
        mechanism="none",
        noise_multiplier=0.0,
        sensitivity_norm="l2",
        reasons=(reason,),
    )
    return plan.result([fmean(sides) if sides else None for sides in present], None, guarantee)


def _row(plan: _Plan, masks: Iterable[Any], octaves: float) -> torch.Tensor:
    """A patient's part of the sum: t - 1/2 for each class, then 1, each 0 without the class."""
    limit = math.ceil(2.0**octaves)
    sides = [
        thickness(check_label_map(plan.function, mask, plan.num_classes), plan.num_classes, limit)
        for mask in masks
    ]
    row = torch.zeros(2, plan.num_foreground, dtype=torch.float64)
    for index, of_class in enumerate(zip(*sides, strict=True)):
        logs = [min(math.log2(side), octaves) / octaves for side in of_class if side]
        if logs:
            row[0, index], row[1, index] = median(logs) - 0.5, 1.0
    return row.flatten()


def _check_plan(
    function: str,
    num_classes: int,
    operation: Any,
    fixed_size: Any,
    kappa: Any,
    *,
    footprint: str,
    border: str,
) -> _Plan:
    count = check_num_classes(function, num_classes)
    operations = _by_class(function, "operation", operation, count)
    sizes = _by_class(function, "fixed_size", fixed_size, count)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{function}: fixed_size must be an int, got {type(size).__name__}")
    plan = _Plan(
        function=function,
        num_classes=count,
        operations=[check_operation(function, each) for each in operations],
        fixed_sizes=sizes,
        kappa=_validate.number(function, "kappa", kappa, minimum=0.0, maximum=1.0, exclusive=True),
        footprint=footprint,
        border=border,
    )
    plan.build(sizes)  # refuses what DPMorph does not take
    return plan


def _by_class(function: str, name: str, value: Any, num_classes: int) -> list[Any]:
    if not isinstance(value, Mapping):
        return [value] * (num_classes - 1)
    classes = range(1, num_classes)
    if set(value) != set(classes):
        raise ValueError(
            f"{function}: {name} must have a value for each of the classes 1 to {num_classes - 1}, "
            f"got {sorted(map(str, value))}"
        )
    return [value[each] for each in classes]


def _check_masks(function: str, masks: Any) -> None:
    if not hasattr(masks, "__len__") or not hasattr(masks, "__getitem__"):
        raise TypeError(
            f"{function}: masks must be a tensor or have a length and an index, got "
            f"{type(masks).__name__}"
        )
    if isinstance(masks, torch.Tensor) and masks.dim() < 3:
        raise ValueError(
            f"{function}: masks must have shape (N, *spatial) or (N, 1, *spatial), got "
            f"{tuple(masks.shape)}"
        )
    if len(masks) == 0:
        raise ValueError(f"{function}: masks must hold a mask, got none")


def _check_ledger(function: str, ledger: Any) -> None:
    if not isinstance(ledger, PrivacyLedger):
        raise TypeError(
            f"{function}: ledger must be a PrivacyLedger, got {type(ledger).__name__}: what is "
            "measured on private masks must be counted"
        )
    ledger.check_writable()
