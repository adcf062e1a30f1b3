#!/usr/bin/env bash
# ZSKT of Fast-Datafree's CIFAR tables. Usage: --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh"
cifar_rows fast ZSKT "$@"
