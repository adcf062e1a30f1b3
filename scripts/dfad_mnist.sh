#!/usr/bin/env bash
# DFAD on MNIST, from the teacher that ships; flags go to reproduce.py and DFAD_mnist.py. `--dataset digits` does it on
# the embedded digits, where the learning rates fall (--scheduler): without that the last epochs scatter.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
case " $* " in
  *" --dataset digits "* | *" --dataset=digits "*)
    exec "$PY" DFAD_mnist.py --scheduler "$@"
    ;;
esac
exec "$PY" reproduce.py --select paper=dfad dataset=mnist method=DFAD "$@"
