"""Sampling, mechanism, accounting and ledger of private training."""

from dpfast.privacy.ledger import PrivacyLedger

__all__ = ["PrivacyLedger"]
