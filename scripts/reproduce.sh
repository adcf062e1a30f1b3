#!/usr/bin/env bash
# Any published cell by its name: `--list` prints all, CELL runs one, `--dry-run` shows how.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec "$PY" reproduce.py "$@"
