#!/usr/bin/env bash
# The test suite in .venv.   bash tools/test.sh [pytest's arguments]
# All of it in as many processes as TEST_PROCESSES says (two unless said); what is named, in one.
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ".[test]"
# A process has one thread: two with two threads each crawl.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $# -eq 0 ]; then
    set -- -n "${TEST_PROCESSES:-2}" --dist worksteal
fi
"$bin/python" -m pytest -q "$@"
