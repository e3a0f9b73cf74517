"""Forward passes that torch.utils.checkpoint runs again, inside the backward pass.

No mode is on there and PyTorch offers no place to hook into, so its own objects are changed: the
function that one checkpointed region runs again is wrapped. Where they look different than expected
the region is refused, or its gradients past the interception are found on leaving the context.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils import checkpoint

__all__ = ["watch_reentrant", "watch_saved_tensor_hooks"]

Seen = Callable[[], AbstractContextManager[Any]]


def _wrapped(function: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with seen():
            return function(*args, **kwargs)

    run._dpfast_seen = True  # type: ignore[attr-defined]
    return run


def _wrap(owner: Any, name: str, seen: Seen) -> None:
    if not hasattr(getattr(owner, name), "_dpfast_seen"):
        setattr(owner, name, _wrapped(getattr(owner, name), seen))


def watch_saved_tensor_hooks(names: str, seen: Seen) -> None:
    """Have a checkpointed region (use_reentrant=False) run again with its calls seen.

    Raises:
      NotImplementedError: other hooks on saved tensors, which may compute them in any way.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return
    pack = hooks[0]
    cells = getattr(pack, "__closure__", None) or ()
    for cell in cells:
        if isinstance(cell.cell_contents, getattr(checkpoint, "_CheckpointFrame", ())):
            _wrap(cell.cell_contents, "recompute_fn", seen)
            return
    raise NotImplementedError(
        f"per_sample_gradients: {names} is used under saved-tensor hooks other than those of "
        "torch.utils.checkpoint"
    )


def watch_reentrant(seen: Seen) -> None:
    """The same for use_reentrant=True, called where gradients are off."""
    frame = sys._getframe()
    code = checkpoint.CheckpointFunction.forward.__code__
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is code:
            _wrap(frame.f_locals["ctx"], "run_function", seen)
            return
