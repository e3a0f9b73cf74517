"""What clipping and noise do to a step; figures without any guarantee."""

from dpfast.privacy.diagnostics.alignment import alignment
from dpfast.privacy.diagnostics.report import AlignmentReport

__all__ = ["AlignmentReport", "alignment"]
