"""The table of the conv_grad benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks import conv_grad
from benchmarks._text import NOT_MEASURED, TextTable
from benchmarks.conv_grad import DPFAST, PEERS, Case

__all__ = ["TEXT", "tables", "unmeasured"]

_PEER_HEADINGS = {
    "loop": "PyTorch, sample by sample / dpfast",
    "grouped": "one grouped convolution / dpfast",
    "batch": "PyTorch's batch gradient / dpfast",
}
_HEADINGS = (
    *("convolution", "B", "ms", "GFLOP/s", "of the ceiling", "FLOP a byte"),
    *(_PEER_HEADINGS[name] for name in PEERS),
    *("norms alone / dpfast", "spread"),
)
_LEFT = ("convolution",)

TEXT = """\
The kernel that `per_sample_gradients` spends its time in: gradients of a convolution's weight, one
per sample, with their norms; 3 taps an axis, padding 1, float32. "of the ceiling" is its operations
a second over those of multiply-adds in registers (on CUDA of a large matrix product) around its
turn. "FLOP a byte" is operations over bytes, where input, gradient and result move once. "one
grouped convolution" is what `torch.func.vmap` makes of it. "PyTorch's batch gradient" is no
per-sample gradient: it is what an ordinary step pays. All answers are checked against float64.
"""


def _row(row: dict[str, Any]) -> list[str]:
    case = Case.from_json(row["case"])
    return [
        case.label,
        str(case.batch_size),
        f"{1e3 * row['seconds'][DPFAST]['median']:.2f}",
        f"{row['operations_per_second']['median'] / 1e9:.0f}",
        f"{100 * row['share_of_ceiling']['median_of_rounds']:.0f} %",
        f"{row['operations'] / row['bytes']:.1f}",
        *(f"{row['over_dpfast'][name]['median_of_rounds']:.2f}x" for name in PEERS),
        f"{row['norms_over_dpfast']['median_of_rounds']:.2f}x",
        f"{100 * row['seconds'][DPFAST]['spread']:.0f} %",
    ]


def tables(result: dict[str, Any]) -> list[TextTable]:
    """What was measured."""
    return [TextTable("per-sample gradients", _HEADINGS, [_row(r) for r in result["rows"]], _LEFT)]


def unmeasured(device_type: str, *, quick: bool) -> list[TextTable]:
    """The table where nobody has measured."""
    rows = [
        [case.label, str(case.batch_size), *[NOT_MEASURED] * (len(_HEADINGS) - 2)]
        for case in conv_grad.cases(device_type, quick=quick)
    ]
    return [TextTable("per-sample gradients", _HEADINGS, rows, _LEFT)]
