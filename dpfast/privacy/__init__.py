"""What a private run guarantees, and what can be said about it."""

from dpfast.privacy._alignment_report import AlignmentReport
from dpfast.privacy.alignment import alignment

__all__ = ["AlignmentReport", "alignment"]
