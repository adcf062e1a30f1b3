#!/usr/bin/env bash
# DFAD on MNIST, teacher and student in one go; `--dataset digits` does it on the embedded digits.
# Trains the teacher first if checkpoints/ lacks it. Flags go to DFAD_mnist.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
dataset=mnist data=()
for ((i = 1; i < $#; i++)); do
  case ${!i} in
    --dataset) n=$((i + 1)) && dataset=${!n} ;;
    --data_root) n=$((i + 1)) && data=(--data_root "${!n}") ;;
  esac
done
if [ ! -e "checkpoints/$dataset-lenet5.pt" ]; then
  recipe=()
  [ "$dataset" = digits ] || recipe=(--recipe dfad-mnist)
  "$PY" teacher_train.py --dataset "$dataset" --model lenet5 ${recipe[@]+"${recipe[@]}"} \
    ${data[@]+"${data[@]}"}
fi
exec "$PY" DFAD_mnist.py "$@"
