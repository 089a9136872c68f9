#!/usr/bin/env bash
# From a clean clone to a pruned model: installs into .venv, prunes the embedded example to 50% under
# a memory cap, prints before and after.   bash tools/quickstart.sh [DIR]
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" "."
out="${1:-out/example-50}"
# So that it works twice in a row; a folder that the user names is not removed.
[ $# -gt 0 ] || rm -rf "$out" "$out.run"
mkdir -p "$(dirname "$out")"
# The example gains nothing from text of its own: docs/results/self_written_2-core-cpu_2026-11-28.md.
"$bin/frugal-bonsai" prune example --sparsity 0.5 --out "$out" --max-cpu-mem 2GB --self-windows 0
