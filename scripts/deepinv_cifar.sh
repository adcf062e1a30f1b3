#!/usr/bin/env bash
# DeepInv-2k (DeepInversion, 2000 steps a batch) of Fast-Datafree's CIFAR tables. Usage: --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh"
cifar_rows fast DeepInv-2k "$@"
