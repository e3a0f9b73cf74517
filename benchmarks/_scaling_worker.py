"""One of the processes of the scaling benchmark: `python -m benchmarks._scaling_worker REQUEST`.

Prints a line when it is ready, then answers every line of its input (a contender and a mode) with
how long so many steps took and on how many samples they were. It ends with its input.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._paths import leave_source_folder


def main(argument: str) -> None:
    """Answer until the input ends."""
    import torch
    import torch.distributed as dist

    from benchmarks.scaling import PROCESSES, Case

    warnings.simplefilter("ignore")
    request = json.loads(argument)
    case, rank = Case.from_json(request["case"]), int(os.environ["RANK"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    on_cuda = request["device"] == "cuda"
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    # Every process takes part in making every group.
    groups = [dist.new_group([each]) for each in range(PROCESSES)]
    turns = _Turns(case, device, rank, groups[rank], request["folder"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        print(json.dumps(turns.take(told["contender"], told["mode"])), flush=True)
    dist.destroy_process_group()


def _digest(model: Any) -> str:
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


class _Turns:
    """The training loops of one process, each of which goes on where it was."""

    def __init__(self, case: Any, device: Any, rank: int, own_group: Any, folder: str) -> None:
        self._case, self._device, self._rank = case, device, rank
        self._own_group, self._folder = own_group, folder
        self._loops: dict[tuple[str, bool], tuple[Any, Iterator[int]]] = {}

    def take(self, contender: str, mode: str) -> dict[str, Any]:
        """Some steps; their seconds and samples, and a digest of the weights after them."""
        import torch
        import torch.distributed as dist

        together = mode == "together"
        make: dict[str, Callable[[bool], tuple[Any, Iterator[int]]]]
        make = {"dpfast": self._private, "ordinary": self._ordinary}
        if (contender, together) not in self._loops:
            self._loops[contender, together] = make[contender](together)
        model, steps = self._loops[contender, together]
        if together:
            dist.barrier()
        began = time.perf_counter()
        samples = sum(next(steps) for _ in range(self._case.steps))
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - began,
            "samples": samples,
            "digest": _digest(model),
        }

    def _task(self, batch_size: int) -> Any:
        from benchmarks._step_task import Case, Task

        case = Case(self._case.network, batch_size, self._case.size, memory_budget=1.0)
        return Task(case, self._device)

    def _private(self, together: bool) -> tuple[Any, Iterator[int]]:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        import dpfast
        from benchmarks._step_task import predict
        from benchmarks.scaling import PROCESSES

        processes = PROCESSES if together else 1
        expected = processes * self._case.batch_size
        task = self._task(4 * expected)
        model = task.model()
        loss = dpfast.per_sample_loss(task.loss)
        mode = "together" if together else "apart"
        engine = dpfast.PrivacyEngine(
            ledger=Path(self._folder) / f"{mode}-{self._rank}.jsonl",
            process_group=None if together else self._own_group,
        )
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-9),
            data_loader=DataLoader(
                TensorDataset(task.batch.images, task.batch.masks), batch_size=expected
            ),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

        def steps() -> Iterator[int]:
            while True:
                for images, masks in loader:
                    optimizer.zero_grad()
                    loss(predict(model, images), masks).sum().backward()
                    optimizer.step()
                    yield len(images)

        return model, steps()

    def _ordinary(self, together: bool) -> tuple[Any, Iterator[int]]:
        import torch
        from torch.nn.parallel import DistributedDataParallel

        from benchmarks._step_task import predict

        task = self._task(self._case.batch_size)
        model = task.model()
        wrapped = DistributedDataParallel(model) if together else model
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-9)

        def steps() -> Iterator[int]:
            while True:
                optimizer.zero_grad()
                task.loss(predict(wrapped, task.batch.images), task.batch.masks).backward()
                optimizer.step()
                yield len(task.batch)

        return model, steps()


if __name__ == "__main__":
    leave_source_folder()
    main(sys.argv[1])
