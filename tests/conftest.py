"""Fixtures: the devices on which the same tests run."""

import os

# Test processes share the cores (`pytest -n`): a thread that waits gives its core up. At least two
# threads, so that what several threads share is tested. Before Torch, which reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))),
)

import pytest
import torch

from dpfast import _native


def _why_no_cuda() -> str | None:
    if not _native.has_cuda_kernels():
        return "this build of dpfast has no CUDA kernels"
    return None if torch.cuda.is_available() else "there is no CUDA device"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """CPU, and CUDA where there is a device and a build for it."""
    if request.param == "cuda" and (reason := _why_no_cuda()):
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device, for what exists there alone; its tests are marked gpu."""
    if reason := _why_no_cuda():
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())
