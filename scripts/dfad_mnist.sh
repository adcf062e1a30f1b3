#!/usr/bin/env bash
# DFAD on MNIST, teacher and student in one go; `--dataset digits` does it on the embedded digits.
# Trains the teacher first if checkpoints/ lacks it. Flags go to DFAD_mnist.py. On the digits the
# learning rates fall (--scheduler): without that the last epochs scatter by several points.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
dataset=$(value_of --dataset "$@") root=$(value_of --data_root "$@")
dataset=${dataset:-mnist}
if [ ! -e "checkpoints/$dataset-lenet5.pt" ]; then
  recipe=dfad-mnist
  [ "$dataset" != digits ] || recipe=digits
  "$PY" teacher_train.py --dataset "$dataset" --model lenet5 --recipe $recipe \
    ${root:+--data_root "$root"}
fi
[ "$dataset" != digits ] || set -- --scheduler "$@"
exec "$PY" DFAD_mnist.py "$@"
