"""How images of one site differ from those of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["SiteShift", "site_shift"]


@dataclass(frozen=True)
class SiteShift:
    """A site's scanner and patients.

    Attributes:
      contrast: factor of every difference of intensity.
      noise: standard deviation, where the tissues differ by about 1.
      zoom: pixels per length: coarse spacing makes everything small.
      prevalence: share of patients with what is not in everybody: tumour, cyst, fluid.
    """

    contrast: float = 1.0
    noise: float = 0.15
    zoom: float = 1.0
    prevalence: float = 0.8


def site_shift(site: int, seed: int) -> SiteShift:
    """The shift of a site; the first has none.

    Args:
      site: from 0.
      seed: >= 0.
    """
    if site == 0:
        return SiteShift()
    rng = np.random.default_rng([seed, site, 1])
    return SiteShift(
        contrast=float(rng.uniform(0.5, 1.5)),
        noise=float(rng.uniform(0.05, 0.35)),
        zoom=float(rng.uniform(0.75, 1.2)),
        prevalence=float(rng.uniform(0.4, 1.0)),
    )
