#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command: build with CUDA kernels, the tests marked
# gpu, compute-sanitizer, the benchmarks. Takes some minutes.
#
#   benchmarks/gpu_check.sh [options of `python -m benchmarks`, such as --commit HASH]
#
# The package is installed into a temporary folder; the environment's packages stay as they are.
# Results: benchmarks/results/<device>/, and a copy in $OUT where that is set. PYTHON chooses the
# interpreter. All parts run; the exit status is non-zero if one failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site logs=$work/logs
mkdir -p "$logs"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

# `pytest` rather than `python -m pytest`: it keeps the source folder `dpfast`, which has no
# extension module, off the import path.
pytest=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/pytest
[ -x "$pytest" ] || pytest=$(command -v pytest)
# Small shapes around the kernels' chunk sizes: the sanitizers slow a kernel down many times.
sanitized=(tests/ops/test_clip_and_noise_edges.py -k chunk_sizes)

parts=()
failed=0

# part NAME SECONDS COMMAND...: run it under a time limit, keep its output in logs/NAME.log.
part() {
  local name=$1 limit=$2 start=$SECONDS status=0 verdict
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="failed: stopped after $limit s" ;;
    *) verdict="failed: exit status $status" ;;
  esac
  if [ "$status" -ne 0 ]; then
    failed=1
    tail -n 40 "$logs/$name.log"
  fi
  parts+=("$name=$verdict=$((SECONDS - start))")
}

skip() {
  parts+=("$1=not run: $2=0")
}

DPFAST_CUDA=ON part build 240 "$python" -m pip install --no-build-isolation --no-deps \
  --disable-pip-version-check --root-user-action ignore --config-settings=build-dir="$work/build" \
  --target "$site" .

results=$root/benchmarks/results/unknown-device
if [ "$failed" -ne 0 ]; then
  for name in tests memcheck racecheck benchmarks conv_grad step memory morphology; do
    skip "$name" "the build failed"
  done
else
  if found=$("$python" -m benchmarks where --device cuda); then results=$found; fi

  parallel=()
  if "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n 4); fi
  part tests 200 "$python" "$pytest" -m gpu -q -p no:cacheprovider ${parallel[@]+"${parallel[@]}"} \
    --junit-xml="$logs/tests.xml"

  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      # Without PyTorch's caching every tensor is an allocation of its own, whose end is checked.
      part "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
        --error-exitcode 99 "$python" "$pytest" -m gpu -q -x -p no:cacheprovider "${sanitized[@]}"
    else
      skip "$tool" "compute-sanitizer is not installed"
    fi
  done

  part benchmarks 180 "$python" -m benchmarks clip_and_noise --device cuda --output "$logs" "$@"
  part conv_grad 120 "$python" -m benchmarks conv_grad --device cuda --output "$logs" "$@"
  if "$python" -c 'import monai, einops' 2>/dev/null; then
    part step 300 "$python" -m benchmarks step --device cuda --output "$logs" "$@"
    part memory 200 "$python" -m benchmarks memory --device cuda --output "$logs" "$@"
  else
    for name in step memory; do skip "$name" "MONAI or einops is not installed"; done
  fi
  part morphology 300 "$python" -m benchmarks morphology --device cuda --output "$logs" "$@"
fi

mkdir -p "$results"
# One line a part on the terminal, and summary.json. A test run that skipped everything has failed.
"$python" - "$logs" "${parts[@]}" <<'PY' || failed=1
import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

logs = Path(sys.argv[1])
summary = {"parts": {}, "missing_packages": []}
for entry in sys.argv[2:]:
    name, verdict, seconds = entry.rsplit("=", 2)
    summary["parts"][name] = {"verdict": verdict, "seconds": int(seconds)}
# Tests and rows that need these are left out without them.
for package in ("einops", "hypothesis", "kornia", "monai", "opacus"):
    if importlib.util.find_spec(package) is None:
        summary["missing_packages"].append(package)
if (logs / "tests.xml").exists():
    suite = ElementTree.parse(logs / "tests.xml").find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    summary["tests"] = counts
    ran = counts["tests"] - counts["skipped"]
    if ran == 0 and summary["parts"]["tests"]["verdict"] == "passed":
        summary["parts"]["tests"]["verdict"] = "failed: every test was skipped"
for tool in ("memcheck", "racecheck"):
    if (logs / f"{tool}.log").exists():
        lines = (logs / f"{tool}.log").read_text(errors="replace").splitlines()
        summary[tool] = [line.strip("= ") for line in lines if "SUMMARY" in line]
(logs / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
print("== summary")
for name, part in summary["parts"].items():
    print(f"{name}: {part['verdict']} ({part['seconds']} s)")
for key in ("tests", "memcheck", "racecheck", "missing_packages"):
    if summary.get(key):
        print(f"{key}: {summary[key]}")
sys.exit(any(part["verdict"].startswith("failed") for part in summary["parts"].values()))
PY

# Only the ends of the logs: a sanitizer that finds something says it thousands of times.
for log in "$logs"/*.log; do
  tail -n 400 "$log" >"$results/$(basename "$log")"
done
find "$logs" -maxdepth 1 \( -name '*.json' -o -name '*.xml' \) -exec cp {} "$results/" \;
echo "results: $results"
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cp -r "$results/." "$OUT/"
fi
exit "$failed"
