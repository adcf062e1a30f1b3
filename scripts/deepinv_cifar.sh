#!/usr/bin/env bash
# DeepInv-2k in Fast-Datafree's CIFAR tables: DeepInversion, 2000 steps a batch. Usage: --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh"
cifar_rows deepinv "2000" "$@"
