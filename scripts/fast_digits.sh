#!/usr/bin/env bash
# Fast-Datafree on the embedded digits: the command line of the CIFAR rows, in minutes on two
# cores. Trains the teacher first if checkpoints/ lacks it. Flags go to datafree_kd.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
if [ ! -e checkpoints/digits-lenet5.pt ]; then
  "$PY" teacher_train.py --dataset digits --model lenet5
fi
exec "$PY" datafree_kd.py --method fast_meta --g_steps 5 --dataset digits --teacher lenet5 \
  --student lenet5_half "$@"
