#!/usr/bin/env bash
# NAYER's published CIFAR values; other pairs have its settings by datafree_kd.py --method nayer. Usage: --help.
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh" nayer NAYER-100,NAYER-200,NAYER-300 "$@"
