#!/usr/bin/env bash
# Hostile inputs and kills -9 over all scripts for so many minutes (--minutes 30), recorded in storm.json;
# exit code 1 if anything failed. --seed N tries others.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements-dev.txt
exec "$PY" tests/storm.py "$@"
