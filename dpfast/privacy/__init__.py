"""Sampling, mechanism, accounting and ledger of private training."""

from dpfast.privacy.engine import PrivacyEngine
from dpfast.privacy.ledger import PrivacyLedger
from dpfast.privacy.loader import PrivateLoader
from dpfast.privacy.thresholds import NoisyHistogram, PercentilePaper, PrivateQuantile

__all__ = [
    "NoisyHistogram",
    "PercentilePaper",
    "PrivacyEngine",
    "PrivacyLedger",
    "PrivateLoader",
    "PrivateQuantile",
]
