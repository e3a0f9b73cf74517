"""`alignment`: what clipping and noise do to the direction of a step, on probe batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dpfast import _validate
from dpfast.errors import PrivacyError
from dpfast.ops import NoiseSource
from dpfast.privacy.diagnostics import figures
from dpfast.privacy.diagnostics.figures import Units
from dpfast.privacy.diagnostics.report import AlignmentReport, RuleFigures, SumFigures
from dpfast.privacy.diagnostics.step import NAME, Probe, Rule, Step, buffers_kept, take_step
from dpfast.privacy.ledger import PrivacyLedger

__all__ = ["alignment"]

_REASON = "non_dp_diagnostics"
_RULES = ("flat", "automatic", "auto_v", "normalized", "psac")
_RULES_WITH_CONSTANT = ("automatic", "normalized", "psac")
_DATA = ("synthetic", "public", "private")
# What belongs to none of the named module groups.
_REST = "(rest)"


def alignment(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    batches: Iterable[Any],
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    data: str,
    ledger: PrivacyLedger | None = None,
    rules: Sequence[str] = _RULES,
    stability_constants: Mapping[str, float] | None = None,
    groups: Sequence[str] | None = None,
    privacy_unit_ids_of: Callable[[Any], torch.Tensor] | None = None,
    foreground_of: Callable[[Any], torch.Tensor] | None = None,
    noise: NoiseSource | None = None,
) -> AlignmentReport:
    """Compare how each clipping rule turns, shrinks and drowns the gradient, on probe batches.

        report = dpfast.alignment(
            model, lambda model, batch: loss(model(batch["image"]), batch["label"]), batches,
            max_grad_norm=1.0, noise_multiplier=1.1, data="public",
        )
        rich.print(report.table())

    With the units' gradients g_i, the rule's weights phi_i and Gaussian noise: T = sum g_i,
    S = sum phi_i g_i and S + noise, for all rules on the same weights and batches. A batch stands
    for a step: the noise does not grow with it, so probe batches should have the expected batch
    size of the training. Figures of sums are taken batch by batch, figures of units over all.

    Args:
      model: in the mode (train or eval) in which it is to be looked at. Its parameters, their
        `.grad` and its buffers stay as they are.
      loss_of: called with the model and a batch; the loss of every sample, shape (B,).
      batches: whatever `loss_of` takes, one at a time; at least one.
      max_grad_norm: bound C of every rule but normalized, whose bound is 1.
      noise_multiplier: z > 0, the noise's standard deviation over the rule's bound.
      data: what the batches are: "synthetic", "public" or "private". The figures carry no
        guarantee; of private data they are a release that no epsilon covers.
      ledger: needed with private data and for nothing else; it is told
        `mark_non_private("non_dp_diagnostics")` before a batch is asked for.
      rules: which to compare: "flat", "automatic", "auto_v", "normalized", "psac".
      stability_constants: gamma or r by rule, for those of `rules` where it is not
        `clip_and_noise`'s default.
      groups: names of modules; a parameter belongs to the longest that contains it, or to
        "(rest)". None: the model's outermost modules and parameters.
      privacy_unit_ids_of: called with a batch; int64 (B,), on the gradients' device. Samples of
        one id in a batch are one unit (a patient), whose gradients are averaged; keep them in one
        batch. None: a sample is a unit.
      foreground_of: called with a batch; (B, classes), >= 0: how much of each class a sample shows,
        as `lambda batch: batch["label"].flatten(2).float().mean(2)` for one channel per class.
        Splits the figures by class (by its column) and by size of the foreground, the row's sum.
      noise: None: a source of its own. Never pass the training's: a draw here would be a step of
        it that the ledger does not know, and a seeded run would go on with other noise.

    Returns:
      The report: `to_dict()` for JSON, `table()` for reading.

    Raises:
      TypeError, ValueError: an argument of the wrong type or value; no batch.
      PrivacyError: private data without a ledger; what `per_sample_gradients` refuses.

    Guarantees:
      None, whatever the noise: norms, weights and T are taken as they are. Arguments are checked
      first, then the ledger is told, then gradients are computed: where these fail, the ledger
      still says so.

    References:
      DP_SPEC section 10; docs/design/alignment.md.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    bound = _validate.number(
        NAME,
        "max_grad_norm",
        max_grad_norm,
        minimum=_validate.MIN_BOUND,
        maximum=_validate.MAX_BOUND,
    )
    multiplier = _validate.number(
        NAME, "noise_multiplier", noise_multiplier, minimum=0.0, maximum=1e30, exclusive=True
    )
    if noise is not None and not isinstance(noise, NoiseSource):
        raise TypeError(f"{NAME}: noise must be a NoiseSource, got {type(noise).__name__}")
    probe = Probe(
        loss_of=loss_of,
        rules=_checked_rules(rules, stability_constants, bound),
        members=_members(model, groups),
        noise_multiplier=multiplier,
        privacy_unit_ids_of=privacy_unit_ids_of,
        foreground_of=foreground_of,
        noise=NoiseSource() if noise is None else noise,
    )
    _tell_ledger(data, ledger)

    with buffers_kept(model):
        steps = [take_step(model, batch, probe) for batch in batches]
    if not steps:
        raise ValueError(f"{NAME}: batches must hold at least one batch, got none")
    return _report(steps, probe, data, bound)


def _checked_rules(rules: Any, constants: Mapping[str, float] | None, bound: float) -> list[Rule]:
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(f"{NAME}: rules must be a sequence of names, got {type(rules).__name__}")
    names = [_validate.choice(NAME, "rules", name, _RULES) for name in rules]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{NAME}: rules must name at least one rule, each once, got {names}")
    given = {} if constants is None else dict(constants)
    allowed = [name for name in names if name in _RULES_WITH_CONSTANT]
    for name, value in given.items():
        _validate.choice(NAME, "stability_constants", name, allowed)
        given[name] = _validate.number(
            NAME, f"stability_constants[{name}]", value, minimum=1e-30, maximum=1e30
        )
    return [Rule(name, 1.0 if name == "normalized" else bound, given.get(name)) for name in names]


def _members(model: nn.Module, groups: Any) -> dict[str, list[int]]:
    """By group: the places of its parameters among those that require grad."""
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    members: dict[str, list[int]] = {}
    if groups is None:
        for place, name in enumerate(names):
            members.setdefault(name.split(".")[0], []).append(place)
        return members
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(
            f"{NAME}: groups must be a sequence of module names, got {type(groups).__name__}"
        )
    modules = [name for name, _ in model.named_modules() if name]
    for group in groups:
        _validate.choice(NAME, "groups", group, modules)
        members[group] = []
    for place, name in enumerate(names):
        containing = [group for group in groups if name.startswith(f"{group}.")]
        members.setdefault(max(containing, key=len, default=_REST), []).append(place)
    empty = [group for group, places in members.items() if not places]
    if empty:
        raise ValueError(f"{NAME}: groups must each hold a trained parameter, got {empty} without")
    return members


def _tell_ledger(data: Any, ledger: Any) -> None:
    """Refuse what is not allowed; note what is allowed and not private."""
    if _validate.choice(NAME, "data", data, _DATA) != "private":
        if ledger is not None:
            raise ValueError(f"{NAME}: ledger belongs to private data, got data {data!r}")
        return
    if ledger is None:
        raise PrivacyError(f"{NAME}: ledger must be given with private data, to note the release")
    if not isinstance(ledger, PrivacyLedger):
        raise TypeError(f"{NAME}: ledger must be a PrivacyLedger, got {type(ledger).__name__}")
    ledger.mark_non_private(_REASON)


def _report(
    steps: Sequence[Step], probe: Probe, data: str, max_grad_norm: float
) -> AlignmentReport:
    units = Units.joined([step.units for step in steps])
    directed = units.cosines.isfinite()
    by_rule = {}
    for rule in probe.rules:
        weights = units.weights[rule.name]
        overall, *of_groups = zip(*(step.sums[rule.name] for step in steps), strict=True)
        by_rule[rule.name] = RuleFigures(
            sensitivity=rule.sensitivity,
            overall=SumFigures.mean(overall),
            groups={g: SumFigures.mean(f) for g, f in zip(probe.members, of_groups, strict=True)},
            batches=list(overall),
            effective_units=[
                figures.effective_number(step.units.weights[rule.name] * step.units.norms)
                for step in steps
            ],
            fraction_clipped=figures.mean_of((weights < 1.0).double()),
            weight_quantiles=figures.quantiles(weights),
        )
    return AlignmentReport(
        data=data,
        non_dp_diagnostics=data == "private",
        max_grad_norm=max_grad_norm,
        noise_multiplier=probe.noise_multiplier,
        units=len(units.norms),
        nonfinite_units=sum(step.nonfinite_units for step in steps),
        quantile_levels=list(figures.QUANTILE_LEVELS),
        norm_quantiles=figures.quantiles(units.norms),
        diversity=[step.diversity for step in steps],
        cosine_by_norm=figures.cosines_by_norm(units),
        spearman=figures.spearman(units.norms[directed], units.cosines[directed]),
        classes=figures.splits_by_class(units),
        foreground_sizes=figures.splits_by_size(units),
        rules=by_rule,
    )
