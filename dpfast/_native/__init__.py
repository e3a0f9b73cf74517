"""The only importer of the extension module: tensors in, pointers and a stream out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch

try:
    from dpfast import _core
except ImportError as error:  # a source checkout before installation, or a broken build
    raise ImportError(
        "dpfast: its extension module cannot be loaded. Install the package with `pip install .`; "
        "if it is installed, Python found the source folder first: run from another folder."
    ) from error

from dpfast._native._morphology import morphology, morphology_backward
from dpfast._native._tensors import DTYPE_CODES, address

__all__ = [
    "CLIPPING_CODES",
    "DTYPE_CODES",
    "MECHANISM_CODES",
    "NORM_CODES",
    "NativeSettings",
    "Stats",
    "TensorTable",
    "build_info",
    "chacha20_block",
    "clip_and_noise",
    "conv_grad",
    "conv_lanes",
    "cuda_driver_version",
    "fill_noise",
    "ghost_norm",
    "has_cuda_kernels",
    "morphology",
    "morphology_backward",
    "multiply_add",
    "plain_tensors",
    "prelu_grad",
    "read_all",
    "table_of",
]

NORM_CODES = {"l2": 0, "l1": 1}
UNTIL_CODES = {"end": 0, "norms": 1, "weights": 2}
MECHANISM_CODES = {"none": 0, "gaussian": 1, "laplace": 2}
CLIPPING_CODES = {
    "none": 0,
    "flat": 1,
    "automatic": 2,
    "auto_v": 3,
    "normalized": 4,
    "psac": 5,
    "custom": 6,
}


class NativeSettings(TypedDict):
    """One call's settings, already checked; tensors are contiguous and on the kernel's device."""

    num_units: int
    num_groups: int
    clipping: str
    stability: float
    norm: str
    percentile: float | None
    bounds: Sequence[float]
    mechanism: str
    noise_multiplier: float
    group_noise_weights: Sequence[float]
    proportional_noise: bool
    average_rows: bool
    single_precision_norms: bool
    divisor: float
    accumulate: bool
    row_order: torch.Tensor | None
    unit_start: torch.Tensor | None
    unit_count: torch.Tensor | None
    device_bounds: torch.Tensor | None
    given_norms: torch.Tensor | None
    custom_weights: torch.Tensor | None
    noise_state: torch.Tensor | None


class Stats(NamedTuple):
    """What a call finds: threshold (G,), norms and weights (G, U), non-finite units (0-d, int64).

    The weights belong to the sums over the units' rows; None unless the call was to end there.
    """

    threshold: torch.Tensor
    norms: torch.Tensor
    nonfinite: torch.Tensor
    weights: torch.Tensor | None


TensorTable = _core.TensorTable

# PyTorch >= 2.10 describes its tensors through DLPack's C interface.
_exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
_reader = (
    None
    if _exchange_api is None
    else _core.PlainReader(_exchange_api, (torch.Tensor, torch.nn.Parameter))
)


def plain_tensors(
    grad_samples: list[torch.Tensor], out: list[torch.Tensor]
) -> _core.TensorTable | None:
    """The call's tensors, where all are as the kernels take them; None where one is not.

    A table means that every check on the tensors' types, shapes, layouts and devices would pass.
    None says nothing: the checks tell what is wrong, if anything is.
    """
    if torch.compiler.is_compiling() or _reader is None:
        return None
    return _reader.read(grad_samples, out)


def table_of(
    grad_samples: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor | None],
    summed: Sequence[bool],
    num_rows: int,
) -> _core.TensorTable:
    """The tensors of a call.

    Args:
      grad_samples: each contiguous (B, *param_shape), or (B, P_k) with contiguous columns.
      out: each contiguous, with P_k elements; None where the call ends before it writes.
      summed: whose rows are all the same, the sum over the units, weighted already.
      num_rows: B.
    """
    tensors = []
    for grad, result, is_sum in zip(grad_samples, out, summed, strict=True):
        numel = grad.numel() // max(1, num_rows) if result is None else result.numel()
        stride = numel if grad.is_contiguous() else grad.stride(0)
        tensors.append(
            (grad.data_ptr(), address(result), stride, numel, DTYPE_CODES[grad.dtype], is_sum)
        )
    return TensorTable(tensors, num_rows)


def clip_and_noise(
    tensors: _core.TensorTable, device: torch.device, settings: NativeSettings, until: str = "end"
) -> Stats:
    """Run the kernels.

    Args:
      tensors: from plain_tensors or table_of; held by the caller until the kernels have run.
      device: where the tensors are.
      settings: see NativeSettings.
      until: "end"; or "norms" or "weights", where the call ends without having written to `out`.

    Raises:
      ValueError: memory that is written is also read or written elsewhere in the call.
    """
    groups, units = settings["num_groups"], settings["num_units"]
    threshold = torch.empty(groups, dtype=torch.float64, device=device)
    norms = torch.empty(groups, units, dtype=torch.float64, device=device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    weights = torch.empty_like(norms) if until == "weights" else None
    on_cpu = device.type == "cpu"
    workspace_bytes = _core.cpu_workspace_bytes if on_cpu else _core.cuda_workspace_bytes
    workspace = torch.empty(
        workspace_bytes(tensors, units, groups), dtype=torch.uint8, device=device
    )
    percentile = settings["percentile"]
    arguments = {
        **settings,
        "row_order": address(settings["row_order"]),
        "unit_start": address(settings["unit_start"]),
        "unit_count": address(settings["unit_count"]),
        "clipping": CLIPPING_CODES[settings["clipping"]],
        "norm": NORM_CODES[settings["norm"]],
        "percentile": -1.0 if percentile is None else percentile,
        "device_bounds": address(settings["device_bounds"]),
        "given_norms": address(settings["given_norms"]),
        "custom_weights": address(settings["custom_weights"]),
        "mechanism": MECHANISM_CODES[settings["mechanism"]],
        "noise_state": address(settings["noise_state"]),
        "threshold": threshold.data_ptr(),
        "norms": norms.data_ptr(),
        "nonfinite": nonfinite.data_ptr(),
        "workspace": workspace.data_ptr(),
        "until": UNTIL_CODES[until],
        "weights": address(weights),
    }
    if on_cpu:
        _core.clip_and_noise_cpu(tensors, arguments, torch.get_num_threads())
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        _core.clip_and_noise_cuda(tensors, arguments, device.index, stream)
    return Stats(threshold, norms, nonfinite, weights)


def conv_grad(
    anchor: torch.Tensor,
    moving: torch.Tensor,
    out: torch.Tensor | None,
    *,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    swapped: bool,
    anchor_sums: torch.Tensor | None = None,
    square_norms: torch.Tensor | None = None,
    allow_tf32: bool = False,
) -> None:
    """Per-sample sums of anchor times moving at every tap (csrc/math/conv_grad.h).

    Args:
      anchor: (N, groups * m, *positions), contiguous: float32 on the CPU; on CUDA float32, bfloat16
        or float16.
      moving: (N, groups * n, *spatial), likewise, of the same dtype.
      out: (N, groups * m, n, *kernel), or where swapped (N, groups * n, m, *kernel) with the taps
        in reverse; contiguous float32. None: not wanted.
      groups: of the convolution.
      kernel: taps along each spatial axis, of which there are 1 to 3.
      stride: of the convolution, per axis.
      padding: zeros before the first value, per axis, >= 0.
      dilation: distance between taps, per axis.
      swapped: which layout `out` has.
      anchor_sums: (N, groups * m) float32, where the anchor's sums over its positions go.
      square_norms: (N,) float64, where the sums of the squares of what `out` gets go.
      allow_tf32: float32 may be rounded to TF32 on CUDA, where `out` is given.

    Raises:
      TypeError: anchor and moving differ in dtype.
      ValueError: a sample or the batch has too many elements for the CUDA kernels.
    """
    if anchor.dtype != moving.dtype:
        raise TypeError(
            f"conv_grad: anchor and moving must have one dtype, got {anchor.dtype} and "
            f"{moving.dtype}"
        )
    missing = 5 - anchor.dim()
    ones, zeros = [1] * missing, [0] * missing
    if anchor.device.type == "cuda":
        device = anchor.device
        call: dict[str, object] = {
            "anchor": anchor.data_ptr(),
            "moving": moving.data_ptr(),
            "out": address(out),
            "anchor_sums": address(anchor_sums),
            "square_norms": address(square_norms),
            "samples": anchor.shape[0],
            "groups": groups,
            "m": anchor.shape[1] // groups,
            "n": moving.shape[1] // groups,
            "anchor_size": [*ones, *anchor.shape[2:]],
            "moving_size": [*ones, *moving.shape[2:]],
            "kernel": [*ones, *kernel],
            "stride": [*ones, *stride],
            "padding": [*zeros, *padding],
            "dilation": [*ones, *dilation],
            "swapped": swapped,
            "dtype": DTYPE_CODES[anchor.dtype],
            "allow_tf32": allow_tf32,
            "workspace": 0,
        }
        workspace = torch.empty(
            _core.conv_grad_cuda_workspace_bytes(call, device.index),
            dtype=torch.uint8,
            device=device,
        )
        call["workspace"] = workspace.data_ptr()
        stream = torch.cuda.current_stream(device).cuda_stream
        _core.conv_grad_cuda(call, device.index, stream)
        return
    _core.conv_grad_cpu(
        anchor.data_ptr(),
        moving.data_ptr(),
        address(out),
        address(anchor_sums),
        address(square_norms),
        anchor.shape[0],
        groups,
        anchor.shape[1] // groups,
        moving.shape[1] // groups,
        [*ones, *anchor.shape[2:]],
        [*ones, *moving.shape[2:]],
        [*ones, *kernel],
        [*ones, *stride],
        [*zeros, *padding],
        [*ones, *dilation],
        swapped,
        torch.get_num_threads(),
    )


def ghost_norm(
    anchor_gram: torch.Tensor,
    moving_gram: torch.Tensor,
    *,
    channels: tuple[int, int],
    anchor_size: Sequence[int],
    moving_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """Squared norms of a convolution's per-sample gradients (csrc/math/conv_grad.h), on the CPU.

    Args:
      anchor_gram: (N, T, T) float64, contiguous: inner products of the T positions' channels.
      moving_gram: (N, S, S), likewise.
      channels: how many the inner products ran over, of the anchor and the moving tensor.
      anchor_size: the anchor's spatial shape, 1 to 3 axes, T in all.
      moving_size: the moving tensor's, S in all.
      kernel: taps along each axis.
      stride: of the convolution, per axis.
      padding: zeros before the first value, per axis, >= 0.
      dilation: distance between taps, per axis.

    Returns:
      (N,) float64, raised by a bound on the rounding errors: never below the true value.
    """
    squares = torch.empty(anchor_gram.shape[0], dtype=torch.float64)
    missing = 3 - len(anchor_size)
    ones, zeros = [1] * missing, [0] * missing
    _core.ghost_norm_cpu(
        anchor_gram.data_ptr(),
        moving_gram.data_ptr(),
        squares.data_ptr(),
        anchor_gram.shape[0],
        *channels,
        [*ones, *anchor_size],
        [*ones, *moving_size],
        [*ones, *kernel],
        [*ones, *stride],
        [*zeros, *padding],
        [*ones, *dilation],
        torch.get_num_threads(),
    )
    return squares


def prelu_grad(
    x: torch.Tensor, grad: torch.Tensor, slopes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """PReLU's backward pass on the CPU, with the slopes' terms summed over each row.

    Args:
      x: (N, C, ...), contiguous float32.
      grad: gradient of the output, likewise.
      slopes: (C,) or (1,), likewise.

    Returns:
      The gradient of x, and (N, C) sums of x * grad over x <= 0.
    """
    grad_x = torch.empty_like(x)
    rows = x.shape[0] * x.shape[1]
    sums = torch.empty(x.shape[:2])
    _core.prelu_grad_cpu(
        x.data_ptr(),
        grad.data_ptr(),
        slopes.data_ptr(),
        grad_x.data_ptr(),
        sums.data_ptr(),
        rows,
        slopes.numel(),
        x.numel() // max(rows, 1),
        torch.get_num_threads(),
    )
    return grad_x, sums


def conv_lanes() -> int:
    """Channels that the convolution kernels take in one vector."""
    return _core.conv_lanes()


def has_cuda_kernels() -> bool:
    """Whether this build holds the CUDA kernels."""
    return _core.cuda_toolkit is not None


def build_info() -> dict[str, str | None]:
    """Version, instruction set in use, CUDA toolkit and architectures of this build."""
    return {
        "version": _core.__version__,
        "instruction_set": _core.instruction_set(),
        "cuda_toolkit": _core.cuda_toolkit,
        "cuda_architectures": _core.cuda_architectures,
    }


def cuda_driver_version() -> str | None:
    """The driver's CUDA version, or None without a driver or a CUDA build."""
    return _core.cuda_driver_version() if has_cuda_kernels() else None


def chacha20_block(key: Sequence[int], counter: int, nonce: Sequence[int]) -> list[int]:
    """One block of RFC 8439: 8 key words, a counter, 3 nonce words to 16 words."""
    return _core.chacha20_block(list(key), counter, list(nonce))


def fill_noise(
    key: Sequence[int],
    step: int,
    tensor: int,
    mechanism: str,
    count: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard noise of elements [0, count) of one tensor at one step, on the CPU."""
    out = torch.empty(count, dtype=dtype)
    _core.fill_noise_cpu(
        list(key),
        step,
        tensor,
        MECHANISM_CODES[mechanism],
        count,
        out.data_ptr(),
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return out


def random_words(noise_state: torch.Tensor, count: int) -> torch.Tensor:
    """The keystream of the CPU state's next step: (count,) int64, all 64 bits uniform."""
    out = torch.empty(count, dtype=torch.int64)
    _core.random_words_cpu(noise_state.data_ptr(), count, out.data_ptr())
    return out


def read_all(data: torch.Tensor) -> int:
    """Read a contiguous CPU tensor once with all threads; returns a checksum."""
    return _core.read_all_cpu(
        data.data_ptr(), data.numel() * data.element_size(), torch.get_num_threads()
    )


def multiply_add(rounds: int) -> int:
    """Keep every thread's float32 units busy, for the benchmarks; how many operations it did."""
    return _core.multiply_add_cpu(rounds, torch.get_num_threads())
