"""The rows of the federated benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Case", "cases", "memory_cases"]


@dataclass(frozen=True)
class Case:
    """A federation of phantoms (64x64) that trains MONAI's UNet.

    Attributes:
      sites: how many.
      patients: of each site, validation included, an image each.
      channels: of the network's levels.
      batch: expected size.
      local_epochs: passes over a site's data in a round.
      rounds: measured in one go.
    """

    sites: int
    patients: int
    channels: tuple[int, ...]
    batch: int = 16
    local_epochs: int = 1
    rounds: int = 3

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.sites} sites, UNet {self.network}"

    @property
    def network(self) -> str:
        """Its levels."""
        return "-".join(map(str, self.channels))

    @classmethod
    def from_json(cls, case: dict[str, Any]) -> Case:
        """What was saved."""
        return cls(**{**case, "channels": tuple(case["channels"])})


def cases(*, quick: bool) -> list[Case]:
    """Rows whose time is measured."""
    if quick:
        return [Case(2, 40, (4, 8), rounds=1)]
    return [
        Case(3, 200, (16, 32, 64)),
        Case(3, 200, (32, 64, 128, 256)),
        Case(10, 100, (16, 32, 64)),
        Case(3, 200, (16, 32, 64), local_epochs=4),
    ]


def memory_cases(*, quick: bool) -> list[Case]:
    """Rows whose memory is measured: the same network at more and more sites."""
    if quick:
        return [Case(2, 12, (4, 8), batch=2, rounds=1)]
    return [Case(n, 10, (64, 128, 256, 512, 512), batch=2, rounds=1) for n in (2, 8, 32)]
