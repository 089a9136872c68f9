# Sourced by quickstart.sh and test.sh: makes .venv if it is not there, installs the package with the
# versions of constraints.txt. Usage: . tools/setup_env.sh EXTRAS   (EXTRAS such as ".[test]")
# On Linux pip's torch brings CUDA, some gigabytes. Without a GPU install torch for the CPU into
# .venv first, as README says: such a build stays, whatever its version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirement="${1:-.}"
if [ ! -x .venv/bin/python ] && [ ! -x .venv/Scripts/python.exe ]; then
    python_command="${PYTHON:-python3}"
    "$python_command" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "frugal-bonsai needs Python 3.10 or newer; set PYTHON=/path/to/it" >&2; exit 1; }
    echo "creating .venv" >&2
    "$python_command" -m venv .venv
fi
bin=.venv/bin
[ -d "$bin" ] || bin=.venv/Scripts
# Install again only when what would be installed has changed.
stamp=".venv/installed-$(cat pyproject.toml tools/constraints.txt | cksum | tr ' ' '-')-${requirement//[^a-z]/}"
if [ ! -f "$stamp" ]; then
    echo "installing $requirement (the first time takes some minutes)" >&2
    constraints=tools/constraints.txt
    if "$bin/python" -m pip list --format=freeze 2>/dev/null | grep -q '^torch==.*+cpu'; then
        constraints=.venv/constraints.txt
        grep -v '^torch==' tools/constraints.txt >"$constraints"
    fi
    "$bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable "$requirement"
    rm -f .venv/installed-*
    touch "$stamp"
fi
