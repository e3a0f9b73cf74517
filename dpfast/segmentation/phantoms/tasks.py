"""Phantoms of a task, at sites that differ from one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpfast import _validate
from dpfast.segmentation.formats import FORMATS
from dpfast.segmentation.phantoms import scenes
from dpfast.segmentation.phantoms._site import SiteShift, site_shift
from dpfast.segmentation.records import Record
from dpfast.segmentation.task import SegmentationTask

__all__ = ["LOOKS", "look_records", "look_task"]


@dataclass(frozen=True)
class _Look:
    draw: Callable[[tuple[int, ...], SiteShift, np.random.Generator], Any]
    size: tuple[int, ...]
    format: str  # whose classes, channels and window it has


LOOKS = {
    "brain": _Look(scenes.brain, (24, 24, 24), "brats"),
    "kidney": _Look(scenes.kidney, (24, 32, 32), "kits19"),
    "retina": _Look(scenes.retina, (64, 96), "duke_oct"),
    "skin": _Look(scenes.skin, (64, 64), "isic2018"),
}


def look_task(look: str) -> SegmentationTask:
    """What there is to learn from phantoms that look like "brain", "kidney", "retina" or "skin".

    Raises:
      ValueError: another look.
    """
    chosen = LOOKS[_validate.choice("look_task", "look", look, tuple(LOOKS))]
    like = FORMATS[chosen.format]
    return SegmentationTask(
        name=f"phantoms ({look})",
        spatial_dims=like.spatial_dims,
        num_classes=len(like.class_values),
        image_size=chosen.size,
        in_channels=like.in_channels,
        class_names=like.class_names,
        window=like.window,
    )


def look_records(look: str, patients: int, *, sites: int = 1, seed: int = 0) -> list[Record]:
    """Draw a patient's image each; what a patient looks like follows from seed and number alone.

    Args:
      look: "brain", "kidney", "retina" or "skin".
      patients: >= sites; dealt to the sites in turn.
      sites: >= 1; each has its own contrast, noise, spacing and prevalence (`site_shift`). The
        column "site" is "site 1" and so on.
      seed: >= 0.

    Raises:
      ValueError: an argument out of its range.
    """
    function = "look_records"
    chosen = LOOKS[_validate.choice(function, "look", look, tuple(LOOKS))]
    if sites < 1 or patients < sites or seed < 0:
        raise ValueError(
            f"{function}: sites must be >= 1, patients >= sites and seed >= 0, got {sites}, "
            f"{patients} and {seed}"
        )
    width = len(str(sites))
    records = []
    for number in range(patients):
        site = number % sites
        rng = np.random.default_rng([seed, number])
        image, label = chosen.draw(chosen.size, site_shift(site, seed), rng)
        name = f"{look}-{seed}-{number:05d}"
        columns = {"site": f"site {site + 1:0{width}d}"}
        records.append(
            Record(image=image, label=label, patient_id=name, name=name, columns=columns)
        )
    return records
