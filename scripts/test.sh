#!/usr/bin/env bash
# Installs what is missing and runs all tests, two at a time. Flags go to pytest (-k NAME, -x, ...).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements-dev.txt requirements-export.txt
exec "$PY" -m pytest -n 2 --dist worksteal "$@"
