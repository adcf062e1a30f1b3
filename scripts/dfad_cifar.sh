#!/usr/bin/env bash
# DFAD of its own paper's table, on CIFAR (as Fast-Datafree runs it: python datafree_kd.py --method dfad). Usage: --help.
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh" dfad DFAD "$@"
