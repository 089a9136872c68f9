# Sourced by quickstart.sh and test.sh: makes .venv if it is not there, installs the package with
# pinned constraints. Usage: . tools/setup_env.sh EXTRAS   (EXTRAS such as ".[test]")
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
    "$bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint tools/constraints.txt --editable "$requirement"
    rm -f .venv/installed-*
    touch "$stamp"
fi
