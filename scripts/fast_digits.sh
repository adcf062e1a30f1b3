#!/usr/bin/env bash
# Fast-Datafree on the embedded digits, its teacher first: the command line of the CIFAR rows, in minutes on two
# cores. Flags go to datafree_kd.py.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
"$PY" teacher_train.py --dataset digits --model lenet5 --resume
exec "$PY" datafree_kd.py --method fast_meta --g_steps 5 --dataset digits "$@"
