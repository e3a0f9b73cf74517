"""Settings files of small runs on phantoms."""

import copy
import json

SMALL = {
    "data": {"kind": "phantoms", "patients": 40, "spatial_dims": 2},
    "model": {"name": "unet", "arguments": {"channels": [4, 8], "strides": [2]}},
    "training": {"epochs": 3, "learning_rate": 0.01, "device": "cpu"},
    "privacy": {
        "noise_multiplier": 1.5,
        "target_delta": 1e-3,
        "max_grad_norm": 1.0,
        "clipping": "automatic",
        "expected_batch_size": 8,
        "physical_batch_size": 5,
    },
}
WITHOUT_PRIVACY = {"private": False, "expected_batch_size": 8, "physical_batch_size": 5}


def with_changes(changes):
    """SMALL with dotted names set; None takes a setting out."""
    settings = copy.deepcopy(SMALL)
    for name, value in changes.items():
        *tables, last = name.split(".")
        table = settings
        for each in tables:
            table = table.setdefault(each, {})
        if value is None:
            del table[last]
        else:
            table[last] = value
    return settings


def write_settings(path, changes=None, folder=None):
    """A TOML file; what these settings hold is written in TOML as in JSON, tables apart."""
    settings = with_changes(changes or {})
    settings.setdefault("output", {"folder": str(folder or path.parent / "run")})
    lines = []
    for table, values in settings.items():
        lines.append(f"[{table}]")
        lines += [f"{name} = {_toml(value)}" for name, value in values.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)
