from collections.abc import Sequence
from typing import Any

__version__: str
cuda_architectures: str | None
cuda_toolkit: str | None

def instruction_set() -> str: ...
def cuda_driver_version() -> str | None: ...

class TensorTable:
    def __init__(
        self, tensors: Sequence[tuple[int, int, int, int, int, bool]], num_rows: int
    ) -> None: ...
    @property
    def num_rows(self) -> int: ...

class PlainReader:
    def __init__(self, api: object, types: tuple[type, ...]) -> None: ...
    def read(self, grads: list[Any], outs: list[Any]) -> TensorTable | None: ...

def cpu_workspace_bytes(tensors: TensorTable, num_units: int, num_groups: int) -> int: ...
def cuda_workspace_bytes(tensors: TensorTable, num_units: int, num_groups: int) -> int: ...
def clip_and_noise_cpu(
    tensors: TensorTable,
    settings: dict[str, object],
    num_threads: int,
) -> None: ...
def clip_and_noise_cuda(
    tensors: TensorTable,
    settings: dict[str, object],
    device: int,
    stream: int,
) -> None: ...
def conv_lanes() -> int: ...
def conv_grad_cpu(
    anchor: int,
    moving: int,
    out: int,
    anchor_sums: int,
    square_norms: int,
    samples: int,
    groups: int,
    m: int,
    n: int,
    anchor_size: Sequence[int],
    moving_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    swapped: bool,
    num_threads: int,
) -> None: ...
def ghost_norm_cpu(
    anchor_gram: int,
    moving_gram: int,
    square_norms: int,
    samples: int,
    m: int,
    n: int,
    anchor_size: Sequence[int],
    moving_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    num_threads: int,
) -> None: ...
def conv_grad_cuda_workspace_bytes(call: dict[str, object], device: int) -> int: ...
def conv_grad_cuda(call: dict[str, object], device: int, stream: int) -> None: ...
def morphology_cpu(
    input: int,
    output: int,
    index: int,
    index_bits: int,
    dtype: int,
    shape: Sequence[int],
    program: Sequence[int],
    values: Sequence[float],
    num_threads: int,
) -> None: ...
def morphology_backward_cpu(
    grad_output: int,
    grad_input: int,
    index: int,
    index_bits: int,
    dtype: int,
    shape: Sequence[int],
    program: Sequence[int],
    values: Sequence[float],
    num_threads: int,
) -> None: ...
def morphology_cuda_workspace_bytes(
    index: int,
    index_bits: int,
    dtype: int,
    shape: Sequence[int],
    program: Sequence[int],
    values: Sequence[float],
    device: int,
) -> int: ...
def morphology_cuda(
    input: int,
    output: int,
    index: int,
    index_bits: int,
    dtype: int,
    shape: Sequence[int],
    program: Sequence[int],
    values: Sequence[float],
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def morphology_backward_cuda(
    grad_output: int,
    grad_input: int,
    index: int,
    index_bits: int,
    dtype: int,
    shape: Sequence[int],
    program: Sequence[int],
    values: Sequence[float],
    device: int,
    stream: int,
) -> None: ...
def prelu_grad_cpu(
    x: int,
    grad: int,
    slopes: int,
    grad_x: int,
    sums: int,
    rows: int,
    channels: int,
    length: int,
    num_threads: int,
) -> None: ...
def chacha20_block(key: Sequence[int], counter: int, nonce: Sequence[int]) -> list[int]: ...
def fill_noise_cpu(
    key: Sequence[int],
    step: int,
    tensor: int,
    mechanism: int,
    count: int,
    out: int,
    double_precision: bool,
    num_threads: int,
) -> None: ...
def random_words_cpu(noise_state: int, count: int, out: int) -> None: ...
def read_all_cpu(data: int, bytes: int, num_threads: int) -> int: ...
def multiply_add_cpu(rounds: int, num_threads: int) -> int: ...
