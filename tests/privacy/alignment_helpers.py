"""Probes for `alignment`, and all its figures computed as plainly as can be."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import dpfast
from dpfast import reference
from tests import tolerances
from tests.grad_sample.helpers import energy, one_at_a_time, random, randomise

RULES = ("flat", "automatic", "auto_v", "normalized", "psac")
BOUND, MULTIPLIER, SEED = 0.7, 0.05, 5
CONSTANTS = {"automatic": 0.01, "normalized": 0.01, "psac": 0.1}
LEVELS = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
# A weight is off by NORM_MARGIN at most, S by as much of sum phi_i n_i: less than 10 |S| here.
RELATIVE = 16 * tolerances.NORM_MARGIN


def conv_net(dtype=torch.float64):
    """Input (B, 1, 6, 6); groups "0", "2" and "4"."""
    return randomise(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False),
            nn.Tanh(),
            nn.Conv2d(3, 2, 2),
            nn.Flatten(),
            nn.Linear(18, 2),
        )
    ).to(dtype)


def batch_of(*scales, seed=1, dtype=torch.float64):
    """Samples whose gradients are about so large; class 1 is rare, every third shows nothing."""
    count = len(scales)
    foreground = random(count, 2, seed=seed + 100).abs() - torch.tensor([0.2, 1.0])
    foreground[::3] = 0.0
    return {
        "image": random(count, 1, 6, 6, seed=seed, dtype=dtype),
        "scale": torch.tensor(scales, dtype=dtype),
        "foreground": foreground.clamp(min=0.0),
        "patient": torch.tensor([9, 4, 9, 7, 4, 2, 7][:count]),
    }


def batches():
    return [
        batch_of(0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 0.05),
        batch_of(5.0, 0.2, 0.0, 0.02, 1.0, seed=2),
    ]


def loss_of(model, batch):
    return energy(model, batch["image"]) * batch["scale"]


def align(model=None, probe=None, loss=loss_of, **settings):
    plain = {"max_grad_norm": BOUND, "noise_multiplier": MULTIPLIER, "data": "synthetic"}
    model = conv_net() if model is None else model
    return dpfast.alignment(model, loss, probe or batches(), **{**plain, **settings})


# --- the plain computation: numpy, one flat gradient after the other ---


def weight(rule, n, constant):
    if rule == "flat":
        return min(1.0, BOUND / n) if n else 1.0
    if rule == "auto_v":
        return BOUND / n if n else 0.0
    if rule == "automatic":
        return BOUND / (n + constant)
    if rule == "normalized":
        return 1.0 / (n + constant)
    return BOUND / (n + constant / (n + constant))


def cosine(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else None


def mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def unit_gradients(model, batch, by_patient):
    """Flat gradients (units, d), one per parameter, and the units' foreground."""
    grads = one_at_a_time(model, lambda m, x, s: energy(m, x) * s, batch["image"], batch["scale"])
    flat = {name: grad.flatten(1).numpy() for name, grad in grads.items()}
    foreground = batch["foreground"].numpy()
    if by_patient:
        patients = batch["patient"].numpy()
        members = [patients == patient for patient in sorted(set(patients))]
        flat = {n: np.stack([g[rows].mean(0) for rows in members]) for n, g in flat.items()}
        foreground = np.stack([foreground[rows].mean(0) for rows in members])
    return flat, foreground


def plain_sums(s, noisy, t, sensitivity):
    cos = cosine(s, t)
    snr = float(np.linalg.norm(s) / (MULTIPLIER * sensitivity * math.sqrt(len(t))))
    return {
        "cosine": cos,
        "sine": math.sqrt(1 - cos**2),
        "norm_ratio": float(np.linalg.norm(s) / np.linalg.norm(t)),
        "signal_to_noise": snr,
        "noisy_cosine": cosine(noisy, t),
        "predicted_noisy_cosine": cos / math.sqrt(1 + 1 / snr**2),
    }


def plain_report(model, probe, groups, by_patient=False, constants=CONSTANTS):
    """All figures as `to_dict` has them."""
    units = [unit_gradients(model, batch, by_patient) for batch in probe]
    flats = [np.concatenate(list(flat.values()), 1) for flat, _ in units]
    foreground = np.concatenate([shown for _, shown in units])
    norms = [np.linalg.norm(flat, axis=1) for flat in flats]
    totals = [flat.sum(0) for flat in flats]
    cosines = [cosine(g, t) for flat, t in zip(flats, totals, strict=True) for g in flat]
    all_norms = np.concatenate(norms)
    names = [name for name, grad in units[0][0].items() for _ in range(grad.shape[1])]
    columns = {None: np.array([True] * len(names))}
    columns |= {group: np.array([n in members for n in names]) for group, members in groups.items()}

    rules, shares = {}, {}
    for place, rule in enumerate(RULES):
        sensitivity = 1.0 if rule == "normalized" else BOUND
        phis = [np.array([weight(rule, n, constants.get(rule)) for n in of]) for of in norms]
        found = {group: [] for group in columns}
        for step, (flat, phi, t) in enumerate(zip(flats, phis, totals, strict=True)):
            s = phi @ flat
            noise = [
                reference.standard_noise(reference.seed_key(SEED), step * len(RULES) + place, index,
                                         "gaussian", grad.shape[1], double_precision=True)
                for index, grad in enumerate(units[step][0].values())
            ]  # fmt: skip
            noisy = s + MULTIPLIER * sensitivity * torch.cat(noise).numpy()
            for group, mask in columns.items():
                found[group].append(plain_sums(s[mask], noisy[mask], t[mask], sensitivity))
        means = {
            group: {name: mean(row[name] for row in rows) for name in rows[0]}
            for group, rows in found.items()
        }
        parts = [phi * n for phi, n in zip(phis, norms, strict=True)]
        shares[rule] = np.concatenate(parts)
        rules[rule] = {
            "sensitivity": sensitivity,
            "overall": means.pop(None),
            "groups": means,
            "batches": found[None],
            "effective_units": [float(part.sum() ** 2 / (part**2).sum()) for part in parts],
            "fraction_clipped": float((np.concatenate(phis) < 1).mean()),
            "weight_quantiles": np.quantile(np.concatenate(phis), LEVELS).tolist(),
        }

    def split(name, mask):
        return {
            "name": name,
            "units": int(mask.sum()),
            "mean_norm": float(all_norms[mask].mean()),
            "mean_cosine": mean(c for c, chosen in zip(cosines, mask, strict=True) if chosen),
            "norm_share": float(all_norms[mask].sum() / all_norms.sum()),
            "clipped_share": {r: float(of[mask].sum() / of.sum()) for r, of in shares.items()},
        }

    fifth = np.digitize(all_norms, np.quantile(all_norms, [0.2, 0.4, 0.6, 0.8]), right=True)
    size = foreground.sum(1)
    third = np.digitize(size, np.quantile(size[size > 0], [1 / 3, 2 / 3]), right=True)
    defined = [(n, c) for n, c in zip(all_norms, cosines, strict=True) if c is not None]
    return {
        "data": "synthetic",
        "non_dp_diagnostics": False,
        "max_grad_norm": BOUND,
        "noise_multiplier": MULTIPLIER,
        "units": len(all_norms),
        "nonfinite_units": 0,
        "quantile_levels": LEVELS,
        "norm_quantiles": np.quantile(all_norms, LEVELS).tolist(),
        "diversity": [float(t @ t / (n @ n)) for t, n in zip(totals, norms, strict=True)],
        "cosine_by_norm": [
            {
                "smallest_norm": float(all_norms[fifth == k].min()),
                "largest_norm": float(all_norms[fifth == k].max()),
                "units": int((fifth == k).sum()),
                "mean_cosine": mean(c for c, at in zip(cosines, fifth, strict=True) if at == k),
            }
            for k in range(5)
        ],
        "spearman": float(scipy.stats.spearmanr(*zip(*defined, strict=True)).statistic),
        "classes": [split(f"class {k}", foreground[:, k] > 0) for k in range(2)],
        "foreground_sizes": [
            split("no foreground", size == 0),
            *(split(f"foreground {k + 1} of 3", (size > 0) & (third == k)) for k in range(3)),
        ],
        "rules": rules,
    }


def assert_alike(found, expected, where="report", relative=RELATIVE):
    """Same structure, names and plain types; numbers up to rounding."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name in expected:
            assert_alike(found[name], expected[name], f"{where}.{name}", relative)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_alike(found[index], value, f"{where}[{index}]", relative)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=relative, abs=relative), where
    else:
        assert found == expected, where
