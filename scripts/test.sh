#!/usr/bin/env bash
# Every test. Arguments go to pytest: scripts/test.sh tests/unit -k rloo
set -euo pipefail
cd "$(dirname "$0")/.."

# Files in order: the long ones of tests/e2e come before the many short ones, which fill up what is left at the end.
pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
