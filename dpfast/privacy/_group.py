"""The processes of one data-parallel run, or the only one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Group"]


class Group:
    """Sums over processes, and what the first process tells the others.

    All processes of a run see the data and trust one another; the noise is the first one's.

    Args:
      handle: a torch.distributed process group; None: the default one where it is initialised.
    """

    def __init__(self, handle: Any = None) -> None:
        self._alone = handle is None and not (dist.is_available() and dist.is_initialized())
        self._handle = handle
        self.size = 1 if self._alone else dist.get_world_size(handle)
        self.rank = 0 if self._alone else dist.get_rank(handle)

    @property
    def is_first(self) -> bool:
        """Whether this process adds the noise and writes the ledger."""
        return self.rank == 0

    def add_up(self, tensors: Mapping[Any, torch.Tensor]) -> None:
        """Replace tensors of one device by their sums over the processes, in place."""
        if self.size == 1:
            return
        # In one order in all processes: a set's would not be.
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
            parts = [tensor for tensor in tensors.values() if tensor.dtype == dtype]
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat, group=self._handle)
            sizes = [part.numel() for part in parts]
            for part, summed in zip(parts, torch.split(flat, sizes), strict=True):
                part.copy_(summed.view_as(part))

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._handle, group_src=0)
        return box[0]

    def share(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give tensors the values that they have in the first process, in place."""
        if self.size == 1:
            return
        for tensor in tensors.values():
            dist.broadcast(tensor.detach(), group=self._handle, group_src=0)
