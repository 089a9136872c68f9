#!/usr/bin/env bash
# Runs the tests in .venv, which it makes if it is not there.
#   bash tools/test.sh             all tests, in TEST_PROCESSES processes (two by default)
#   bash tools/test.sh --fast      the same without the tests marked slow
#   bash tools/test.sh ARGUMENTS   pytest with these arguments, in one process
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" ".[test]"
# One thread a process: two processes with two threads each slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Without compiled files every process of a test would compile the package again.
unset PYTHONDONTWRITEBYTECODE
processes=(-n "${TEST_PROCESSES:-2}" --dist worksteal)
if [ $# -eq 0 ]; then
    set -- "${processes[@]}"
elif [ "$1" = --fast ]; then
    shift
    set -- "${processes[@]}" -m "not slow" "$@"
fi
"$bin/python" -m pytest -q "$@"
