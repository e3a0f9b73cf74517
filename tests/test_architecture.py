"""Who may import or include whom, and how long a file may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "dpfast").rglob("*.py"))
BESIDE = sorted(p for folder in ("benchmarks", "examples") for p in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
MAX_LINES = 500

# From the lowest layer to the highest; a module may import its own layer and those below.
LAYERS = (
    *("_core", "_native", "ops", "grad_sample", "privacy", "morphology", "profiling"),
    *("segmentation", "federated", "cli"),
)
# These import nothing of the package, so every layer may use them.
SHARED = ("errors", "_validate")
# The package's front: re-exports, so it may import every layer.
FRONT = "__init__"
MAY_IMPORT_REFERENCE = ("dpfast/cli/doctor.py",)
# C++ folders and what each may include.
INCLUDES = {
    "math": ("math",),
    "cpu": ("cpu", "math"),
    "cuda": ("cuda", "math"),
    "bindings": ("bindings", "cpu", "cuda", "math"),
    "tests": ("tests", "cpu", "cuda", "math"),
}


def imported(source: str, package: str) -> list[str]:
    """Dotted names that the source imports; `from a import b` gives a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            # importlib.import_module("dpfast...") and __import__ count too.
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and node.args:
                argument = node.args[0]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    names.append(argument.value)
    return names


def python_violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of a module at `path`, relative to the repository."""
    parts = Path(path).with_suffix("").parts
    package = ".".join(parts[:-1])
    own = parts[1]
    wrong = []
    for name in imported(source, package):
        if name != "dpfast" and not name.startswith("dpfast."):
            continue
        target = name.split(".")[1] if "." in name else FRONT
        allowed = target == own
        if own == "reference":
            allowed = target == "reference"
        elif target == "reference":
            allowed = path in MAY_IMPORT_REFERENCE
        elif target == "_core":
            allowed = own == "_native"
        elif own == FRONT:
            allowed = target in LAYERS or target in SHARED
        elif own in SHARED:
            allowed = False
        elif target in SHARED:
            allowed = own in LAYERS
        elif own in LAYERS and target in LAYERS:
            allowed = LAYERS.index(target) <= LAYERS.index(own)
        elif target not in LAYERS and own == "cli":
            allowed = True  # the front's version and names
        if not allowed:
            wrong.append(f"{path} imports {name}")
    return wrong


def native_violations(path: str, source: str) -> list[str]:
    """What is wrong with the includes of a file at `path`, relative to csrc/."""
    folder = Path(path).parts[0]
    wrong = []
    for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.MULTILINE):
        top = header.split("/")[0]
        if (top in INCLUDES and top not in INCLUDES[folder]) or ".." in header:
            wrong.append(f"{path} includes {header}")
        heavy = top in ("pybind11", "torch", "ATen", "c10") or header in ("Python.h",)
        if heavy and folder != "bindings":
            wrong.append(f"{path} includes {header}")
    return wrong


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_architecture_python_imports_point_downwards(path):
    assert python_violations(path.relative_to(ROOT).as_posix(), path.read_text()) == []


@pytest.mark.parametrize("path", BESIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_architecture_examples_and_benchmarks_import_no_extension_module(path):
    names = imported(path.read_text(), path.parent.name)
    assert not any(name.startswith(("dpfast._core", "dpfast.reference")) for name in names)


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_architecture_native_includes_point_downwards(path):
    assert native_violations(path.relative_to(ROOT / "csrc").as_posix(), path.read_text()) == []


def test_architecture_files_are_short():
    found = [
        path
        for folder in ("dpfast", "csrc", "tests", "examples", "benchmarks")
        for suffix in ("py", "pyi", "cpp", "cu", "cuh", "h", "inc")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    assert len(found) > 40
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in found}
    assert {name: n for name, n in lengths.items() if n >= MAX_LINES} == {}


def test_architecture_every_folder_is_known():
    # A new folder must be given its place above, or its files would go unchecked.
    native = {p.relative_to(ROOT / "csrc").parts[0] for p in NATIVE}
    assert native <= set(INCLUDES)
    names = {p.relative_to(ROOT / "dpfast").with_suffix("").parts[0] for p in PYTHON}
    assert names <= {*LAYERS, *SHARED, FRONT, "__main__", "reference"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dpfast/ops/new.py", "from dpfast import _core"),
        ("dpfast/ops/new.py", "import dpfast._core as c"),
        ("dpfast/ops/new.py", "from dpfast._core import chacha20_block"),
        ("dpfast/ops/new.py", "from .. import _core"),
        ("dpfast/ops/new.py", "def f():\n    importlib.import_module('dpfast._core')"),
        ("dpfast/ops/new.py", "from dpfast.privacy import x"),
        ("dpfast/ops/new.py", "from dpfast.reference import clip_and_noise"),
        ("dpfast/ops/new.py", "from dpfast import reference"),
        ("dpfast/ops/new.py", "def f():\n    from ..reference import noise"),
        ("dpfast/ops/new.py", "from dpfast import clip_and_noise"),
        ("dpfast/_native.py", "from dpfast.ops import clip_and_noise"),
        ("dpfast/_native.py", "from dpfast import ops"),
        ("dpfast/privacy/new.py", "from dpfast.cli import app"),
        ("dpfast/grad_sample/new.py", "from dpfast.privacy import x"),
        ("dpfast/cli/app.py", "from dpfast import reference"),
        ("dpfast/cli/app.py", "from dpfast import _core"),
        ("dpfast/__init__.py", "from dpfast import reference"),
        ("dpfast/__init__.py", "from dpfast._core import x"),
        ("dpfast/reference/new.py", "from dpfast.ops import NoiseSource"),
        ("dpfast/reference/new.py", "from dpfast import _native"),
        ("dpfast/reference/new.py", "import dpfast"),
        ("dpfast/errors.py", "from dpfast.ops import x"),
    ],
)  # fmt: skip
def test_architecture_python_check_finds_bad_imports(path, source):
    assert len(python_violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dpfast/_native.py", "from dpfast import _core"),
        ("dpfast/ops/new.py", "import torch\nfrom dpfast import _native, _validate"),
        ("dpfast/ops/new.py", "from dpfast.errors import PrivacyError\nfrom dpfast.ops.x import y"),
        ("dpfast/privacy/new.py", "from dpfast.ops import clip_and_noise"),
        ("dpfast/cli/doctor.py", "from dpfast import reference"),
        ("dpfast/cli/app.py", "import dpfast\nfrom dpfast import __version__"),
        ("dpfast/reference/new.py", "import math\nfrom dpfast.reference.noise import seed_key"),
        ("dpfast/__init__.py", "from dpfast.ops import clip_and_noise"),
    ],
)
def test_architecture_python_check_accepts_good_imports(path, source):
    assert python_violations(path, source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("math/new.h", '#include "cpu/kernels.h"'),
        ("math/new.h", "#include <torch/extension.h>"),
        ("math/new.h", "  #  include <Python.h>"),
        ("cpu/new.cpp", '#include "cuda/device_info.h"'),
        ("cpu/new.cpp", '#include "bindings/module.h"'),
        ("cpu/new.cpp", "#include <pybind11/pybind11.h>"),
        ("cpu/new.cpp", '#include "../cuda/device_info.h"'),
        ("cuda/new.cu", '#include "cpu/kernels.h"'),
        ("cuda/new.cu", "#include <ATen/ATen.h>"),
        ("tests/new.cpp", '#include "bindings/module.h"'),
    ],
)
def test_architecture_native_check_finds_bad_includes(path, source):
    assert len(native_violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("math/new.h", '#include <cmath>\n#include "math/macros.h"'),
        ("cuda/new.cu", '#include <cuda_runtime.h>\n#include "math/noise.h"'),
        ("bindings/new.cpp", '#include <pybind11/stl.h>\n#include "cpu/kernels.h"'),
        ("cpu/new.cpp", '// #include "cuda/x.h"'),
    ],
)
def test_architecture_native_check_accepts_good_includes(path, source):
    assert native_violations(path, source) == []
