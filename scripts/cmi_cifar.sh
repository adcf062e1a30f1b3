#!/usr/bin/env bash
# CMI-500 in Fast-Datafree's CIFAR tables: contrastive model inversion, 500 steps a batch. Usage: --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh"
cifar_rows cmi "500" "$@"
