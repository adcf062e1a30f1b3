#!/usr/bin/env bash
# DFAD on MNIST, its teacher first; flags go to reproduce.py and DFAD_mnist.py. `--dataset digits` does it on the
# embedded digits, where the learning rates fall (--scheduler): without that the last epochs scatter by several points.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
case " $* " in
  *" --dataset digits "* | *" --dataset=digits "*)
    "$PY" teacher_train.py --dataset digits --model lenet5 --resume
    exec "$PY" DFAD_mnist.py --scheduler "$@"
    ;;
esac
exec "$PY" reproduce.py --select paper=dfad dataset=mnist method=DFAD "$@"
