#!/usr/bin/env bash
# DeepInv-2k (DeepInversion, 2000 steps a batch) of Fast-Datafree's CIFAR tables. Usage: --help.
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh" fast DeepInv-2k "$@"
