#!/usr/bin/env bash
# From nothing to distilled students: installs what is missing, then teacher, baselines, DAFL, Fast-5 and
# NAYER on the embedded digits. Flags go to quickstart.py (--help shows them).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec "$PY" quickstart.py "$@"
