"""Where DP-Morph helps: ways to train and predict compared, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._dp_morph_words import SCORES, WAYS

__all__ = ["Difference", "Setting", "clear_settings", "difference", "verdict"]

Run = Mapping[str, Any]
_ERROR = 0.05

_PREAMBLE = """\
A run's score is its mean over the classes. Differences are means over the settings (ε and clipping
rule), a positive one better; in brackets the 95 % confidence interval that the spread over the
seeds gives (Welch and Satterthwaite; by pairs where both sides are the same networks). A setting is
*clear* where the test rejects equality at 5 % over all the settings of the row together (Holm's
correction).
"""


@dataclass(frozen=True)
class _Comparison:
    """One way to train and predict against another."""

    variant: str
    way: str
    other_variant: str
    other_way: str

    @property
    def words(self) -> str:
        return (
            f"{_words(self.variant, self.way)} against {_words(self.other_variant, self.other_way)}"
        )


def _words(variant: str, way: str) -> str:
    return f"{variant}{WAYS[way].removeprefix(',')}"


_COMPARISONS = (
    # What the training alone does, what the operation alone does, and both together.
    _Comparison("fixed", "scores", "none", "scores"),
    _Comparison("adaptive", "scores", "none", "scores"),
    _Comparison("none", "morphed_scores", "none", "scores"),
    _Comparison("fixed", "morphed_scores", "none", "scores"),
    _Comparison("adaptive", "morphed_scores", "none", "scores"),
    # What the training adds where the operation is there in any case.
    _Comparison("fixed", "morphed_scores", "none", "morphed_scores"),
    _Comparison("adaptive", "morphed_scores", "none", "morphed_scores"),
    _Comparison("none", "refined_scores", "none", "scores"),
    _Comparison("fixed", "refined_scores", "none", "scores"),
    _Comparison("adaptive", "refined_scores", "none", "scores"),
)


@dataclass(frozen=True)
class Setting:
    """Scores, more being better, of the runs of both sides in one setting.

    Attributes:
      scores: of one side; where both sides are the same networks, the differences.
      others: of the other side; empty where `scores` are differences.
    """

    name: str
    scores: Sequence[float]
    others: Sequence[float] = ()

    @property
    def difference(self) -> float:
        others = statistics.mean(self.others) if self.others else 0.0
        return statistics.mean(self.scores) - others

    @property
    def variances(self) -> tuple[tuple[float, int], ...]:
        """Of either side's mean, with its degrees of freedom."""
        sides = [side for side in (self.scores, self.others) if side]
        return tuple((statistics.variance(side) / len(side), len(side) - 1) for side in sides)


@dataclass(frozen=True)
class Difference:
    """An estimate and its confidence interval."""

    mean: float
    low: float
    high: float


def _mean_error_freedom(settings: Sequence[Setting]) -> tuple[float, float, float]:
    """Mean difference over the settings, its standard error, and Satterthwaite's freedom."""
    parts = [part for setting in settings for part in setting.variances]
    squares = [(variance / len(settings) ** 2, freedom) for variance, freedom in parts]
    total = sum(variance for variance, _ in squares)
    spread = sum(variance**2 / freedom for variance, freedom in squares)
    mean = statistics.mean(setting.difference for setting in settings)
    return mean, math.sqrt(total), total**2 / spread if spread > 0 else math.inf


def difference(settings: Sequence[Setting]) -> Difference:
    """Mean over the settings, which are no sample of settings: the seeds alone vary."""
    from scipy import stats

    mean, error, freedom = _mean_error_freedom(settings)
    half = float(stats.t.ppf(1 - _ERROR / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half)


def clear_settings(settings: Sequence[Setting]) -> tuple[list[str], list[str]]:
    """Names of the settings that are clearly better, and clearly worse (Holm 1979)."""
    from scipy import stats

    tested = []
    for setting in settings:
        mean, error, freedom = _mean_error_freedom([setting])
        if error > 0:
            chance = 2 * float(stats.t.sf(abs(mean) / error, freedom))
        else:
            chance = 0.0 if mean != 0 else 1.0
        tested.append((chance, setting))
    better: list[str] = []
    worse: list[str] = []
    for rank, (chance, setting) in enumerate(sorted(tested, key=lambda each: each[0])):
        if chance > _ERROR / (len(tested) - rank):
            break
        (better if setting.difference > 0 else worse).append(setting.name)
    return better, worse


def _settings(runs: Sequence[Run], comparison: _Comparison, score: str, sign: int) -> list[Setting]:
    found = []
    for epsilon in sorted({run["epsilon"] for run in runs}):
        for rule in dict.fromkeys(run["rule"] for run in runs):
            here = [run for run in runs if (run["epsilon"], run["rule"]) == (epsilon, rule)]
            scores, others = (
                [sign * _over_classes(run[way][score]) for run in here if run["variant"] == variant]
                for variant, way in (
                    (comparison.variant, comparison.way),
                    (comparison.other_variant, comparison.other_way),
                )
            )
            if min(len(scores), len(others)) < 2:
                continue
            if comparison.variant == comparison.other_variant:
                scores, others = [a - b for a, b in zip(scores, others, strict=True)], []
            found.append(Setting(f"{rule} at ε = {epsilon:g}", scores, others))
    return found


def _over_classes(values: Sequence[float | None]) -> float:
    return statistics.mean(value for value in values if value is not None)


def verdict(runs: Sequence[Run], ways: Sequence[str]) -> list[str]:
    """Lines of the page: a table of comparisons for each measure, and a sentence on each."""
    lines = []
    for score, (name, digits, sign) in SCORES.items():
        rows, differences = [], {}
        for comparison in _COMPARISONS:
            if not {comparison.way, comparison.other_way} <= set(ways):
                continue
            settings = _settings(runs, comparison, score, sign)
            if not settings:
                continue
            found = difference(settings)
            differences[comparison] = found
            better, worse = clear_settings(settings)
            rows.append(
                f"| {comparison.words} | {_signed(found, digits)} | {len(settings)} | "
                f"{_list(better)} | {_list(worse)} |"
            )
        if rows:
            lines += [
                f"#### {name}\n",
                _sentence(differences),
                "",
                "| comparison | difference | settings | clearly better in | clearly worse in |",
                "|" + " --- |" * 5,
                *rows,
                "",
            ]
    return [_PREAMBLE, *lines] if lines else ["Fewer than two seeds were run: no comparison.", ""]


def _signed(found: Difference, digits: int) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def _sentence(differences: Mapping[_Comparison, Difference]) -> str:
    """Plainly: which comparisons are better, worse or neither over all settings."""
    kinds: dict[str, list[str]] = {"Better": [], "Worse": [], "No difference shown": []}
    for comparison, found in differences.items():
        kind = "Better" if found.low > 0 else "Worse" if found.high < 0 else "No difference shown"
        kinds[kind].append(comparison.words)
    return " ".join(f"**{kind}**: {'; '.join(each)}." for kind, each in kinds.items() if each)


def _list(settings: Sequence[str]) -> str:
    return f"{len(settings)} ({', '.join(settings)})" if settings else "none"
