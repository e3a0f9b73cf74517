"""Which layer an event of PyTorch's profiler belongs to, and in which pass.

A layer's forward pass runs inside a named range. The backward pass knows no layers; but a node of
the graph bears the sequence number that the operation recorded which made it. Operations record the
number of the node to come: of all that recorded one number, the last one has made its node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["LAYER_PREFIX", "OUTSIDE", "Owner", "owners"]

LAYER_PREFIX = "dpfast.layer::"
OUTSIDE = "(no layer)"

_NODE_PREFIX = "autograd::engine::evaluate_function: "

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Owner:
    """Whose an event is.

    Attributes:
      layer: name of the layer; `OUTSIDE` where there is none.
      phase: pass in which it ran; what is not in the graph's backward pass counts as forward.
    """

    layer: str
    phase: Phase


def _layer_of_range(event: Any) -> str | None:
    name: str = event.name
    return name.removeprefix(LAYER_PREFIX) if name.startswith(LAYER_PREFIX) else None


def _chain(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _in_forward(event: Any) -> str | None:
    """The innermost layer whose range holds the event, None in the backward pass."""
    layer = None
    for each in _chain(event):
        if each.name.startswith(_NODE_PREFIX):
            return None
        layer = layer if layer is not None else _layer_of_range(each)
    return OUTSIDE if layer is None else layer


def _makers(events: Iterable[Any]) -> Mapping[int, str]:
    """The layer whose forward pass has made each node, by sequence number."""
    found: dict[int, str] = {}
    for event in sorted(events, key=lambda each: each.time_range.start):
        if event.sequence_nr < 0:
            continue
        layer = _in_forward(event)
        if layer is not None:
            found[event.sequence_nr] = layer
    return found


def owners(events: Iterable[Any]) -> list[tuple[Any, Owner]]:
    """Every event with its owner.

    Args:
      events: `torch.profiler.profile.events()` of one device's host side.
    """
    known = list(events)
    makers = _makers(known)
    found = []
    for event in known:
        owner = Owner(OUTSIDE, "forward")
        for each in _chain(event):
            layer = _layer_of_range(each)
            if layer is not None:
                # Within a node: what checkpointing computes again.
                again = any(above.name.startswith(_NODE_PREFIX) for above in _chain(each))
                owner = Owner(layer, "backward" if again else "forward")
                break
            if each.name.startswith(_NODE_PREFIX):
                owner = Owner(makers.get(each.sequence_nr, OUTSIDE), "backward")
                break
        found.append((event, owner))
    return found
