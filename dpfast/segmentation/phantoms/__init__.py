"""Phantoms: images drawn at will, for trying things out without anybody's data."""

from __future__ import annotations

from dpfast.segmentation.phantoms._site import SiteShift, site_shift
from dpfast.segmentation.phantoms.ellipses import phantom_records, phantom_task
from dpfast.segmentation.phantoms.tasks import LOOKS, look_records, look_task

__all__ = [
    "LOOKS",
    "SiteShift",
    "look_records",
    "look_task",
    "phantom_records",
    "phantom_task",
    "site_shift",
]
