"""How the DP-Morph experiment's page names measures, ways of predicting and classes."""

from __future__ import annotations

__all__ = ["CLASSES", "SCORES", "VARIANTS", "WAYS"]

# Name, digits, and whether more is better.
SCORES = {
    "dice": ("Dice", 3, 1),
    "hausdorff95": ("95 % Hausdorff distance, pixels", 1, -1),
    "surface_dice": ("surface Dice at 1 pixel", 3, 1),
}
VARIANTS = ("none", "fixed", "adaptive")
CLASSES = {
    "hippocampus": ("anterior", "posterior"),
    "covid": (
        *("cardiomediastinum", "right lung", "left lung"),
        *("airways", "ground glass", "consolidation"),
    ),
}
# How a prediction was made: what is added to a measure's name.
WAYS = {
    "scores": "",
    "morphed_scores": ", after the closing",
    "refined_scores": ", after the closing on class maps",
}
