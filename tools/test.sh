#!/usr/bin/env bash
# The test suite in .venv.   bash tools/test.sh [pytest's arguments]
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ".[test]"
# One process with its own threads: two processes with two threads each crawl.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$bin/python" -m pytest -q "$@"
