"""One page about finished federated runs."""

from __future__ import annotations

from dpfast.federated.report.page import write_report

__all__ = ["write_report"]
