#!/usr/bin/env bash
# From nothing to a distilled student: installs what is missing, then teacher, baselines and DAFL
# on the embedded digits. Flags go to quickstart.py (--help shows them).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec "$PY" quickstart.py "$@"
