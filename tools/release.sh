#!/usr/bin/env bash
# Build the source archive and the wheel of the last commit, check them, and say what they need.
#
#   bash tools/release.sh [OUT]        OUT is dist/release by default; it must not exist
#
# PYTHON is the interpreter of an environment with the dependencies (.venv/bin/python by default).
# Both archives are built twice and must be the same to the byte. The wheel is installed into an
# empty environment and prunes the example there. OUT gets the archives, SHA256SUMS, sbom.cdx.json
# (CycloneDX) and audit.txt, where pip-audit can be reached.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-dist/release}")
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
[ ! -e "$out" ] || { echo "$out exists; name another folder"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export SOURCE_DATE_EPOCH PYTHONHASHSEED=0
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)

build() { # FOLDER: both archives of a clean copy of the commit
    mkdir -p "$1/source" "$1/out"
    git archive HEAD | tar -x -C "$1/source"
    (umask 022; cd "$1/source"; "$python" - "$1/out" <<'PY'
import sys
from setuptools import build_meta
out = sys.argv[1]  # which setuptools replaces
build_meta.build_sdist(out)
build_meta.build_wheel(out)
PY
    ) > "$1/log.txt" 2>&1 || { cat "$1/log.txt"; exit 1; }
    "$python" tools/release_check.py repack "$1"/out/*.tar.gz
}

build "$work/one"
build "$work/two"
diff -r "$work/one/out" "$work/two/out" || { echo "two builds differ"; exit 1; }
echo "built twice, the same to the byte"
mkdir -p "$out"
cp "$work"/one/out/* "$out"
"$python" tools/release_check.py contents "$out"/*.whl "$out"/*.tar.gz

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps --no-index "$out"/*.whl
packages=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
# The dependencies come from the other environment; the package itself from the wheel.
run() { (cd "$work" && PYTHONPATH="$packages" "$work/venv/bin/python" -c "
import sys
sys.path.sort(key=lambda place: '$packages' in place)
$1" "${@:2}"); }
run "
import frugal_bonsai
from importlib.metadata import entry_points
assert frugal_bonsai.__file__.startswith('$work'), frugal_bonsai.__file__
[script] = entry_points(group='console_scripts', name='frugal-bonsai')
assert callable(script.load())"
run "
from frugal_bonsai.cli import main
sys.argv[0] = 'frugal-bonsai'
main()" prune example --sparsity 0.2 --self-windows 0 --level none --refine 0 --windows 8 \
    --window 64 --max-cpu-mem 4GB --out "$work/pruned" --quiet > /dev/null
echo "the wheel, installed alone, prunes the example"

"$python" tools/release_check.py sbom > "$out/sbom.cdx.json"
(cd "$out" && sha256sum ./*.whl ./*.tar.gz sbom.cdx.json > SHA256SUMS && cat SHA256SUMS)
if "$python" -m pip_audit --version > /dev/null 2>&1; then
    "$python" -m pip_audit --progress-spinner off > "$out/audit.txt" 2>&1 || {
        cat "$out/audit.txt"; echo "pip-audit: see above"; exit 1; }
    cat "$out/audit.txt"
    # An index without vulnerability data answers so for every package.
    echo "not audited: $(grep -c 'could not be audited' "$out/audit.txt" || true) packages"
else
    echo "pip-audit is not installed here: dependencies were not audited"
fi
