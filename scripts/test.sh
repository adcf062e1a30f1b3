#!/usr/bin/env bash
# Installs what is missing and runs all tests. Flags go to pytest (-k NAME, -x, ...).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup pytest
exec "$PY" -m pytest "$@"
