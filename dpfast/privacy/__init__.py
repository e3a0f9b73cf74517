"""Sampling, mechanism, accounting and ledger of private training; its diagnostics."""

from dpfast.privacy.diagnostics import AlignmentReport, alignment
from dpfast.privacy.engine import PrivacyEngine
from dpfast.privacy.ledger import PrivacyLedger
from dpfast.privacy.loader import PrivateLoader
from dpfast.privacy.thresholds import NoisyHistogram, PercentilePaper, PrivateQuantile

__all__ = [
    "AlignmentReport",
    "NoisyHistogram",
    "PercentilePaper",
    "PrivacyEngine",
    "PrivacyLedger",
    "PrivateLoader",
    "PrivateQuantile",
    "alignment",
]
