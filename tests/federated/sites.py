"""Small federations of phantoms, for the tests of this folder."""

from pathlib import Path

from dpfast.federated import Site, SiteFolder
from dpfast.federated.settings import FederatedSettings, load_federated_settings
from dpfast.segmentation.data import make_data
from dpfast.segmentation.phantoms import phantom_records, phantom_task

TABLES = {
    "data": {"kind": "phantoms", "patients": 60},
    "sites": {"kind": "iid", "number": 3},
    "model": {"arguments": {"channels": [4, 8], "strides": [2]}},
    "training": {"learning_rate": 0.02},
    "federation": {"rounds": 3},
    "privacy": {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "max_grad_norm": 1.0,
        "expected_batch_size": 8,
    },
}


def toml(value):
    """A value of a TOML file; null is left out by `write`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{name}" = {toml(each)}' for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def write(path: Path, **changes) -> Path:
    """A settings file; `changes` are merged into its tables, a table that is None goes."""
    tables = {**TABLES, "output": {"folder": str(path / "run")}}
    for name, change in changes.items():
        tables[name] = None if change is None else {**tables.get(name, {}), **change}
    lines = []
    for name, table in tables.items():
        if table is None:
            continue
        lines.append(f"[{name}]")
        lines += [f"{key} = {toml(value)}" for key, value in table.items() if value is not None]
    path.mkdir(parents=True, exist_ok=True)
    file = path / "federation.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def settings(path: Path, **changes) -> FederatedSettings:
    return load_federated_settings(write(path, **changes))


def make_site(path: Path, name="A", *, number=0, patients=20, seed=7, **changes) -> Site:
    """A site with phantoms of its own."""
    federated = settings(path, **changes)
    records = phantom_records(patients, 2, seed=number)
    folder = path / "sites" / name
    return Site(
        name,
        federated.of_site(folder),
        make_data(phantom_task(2), records, federated.data),
        SiteFolder(folder),
        local_epochs=federated.training.local_epochs,
        proximal_mu=federated.training.proximal_mu,
        seed=None if seed is None else seed + number,
    )
