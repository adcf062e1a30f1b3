#!/usr/bin/env bash
# Fast-Datafree on the embedded digits, from the teacher that ships: the command line of the CIFAR rows, in minutes on
# two cores. Flags go to datafree_kd.py.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec "$PY" datafree_kd.py --method fast_meta --g_steps 5 --dataset digits "$@"
