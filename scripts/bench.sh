#!/usr/bin/env bash
# Times the steps of a setting (--setting NAME) in the published way and in ours. Flags go to bench.py.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec "$PY" bench.py "$@"
