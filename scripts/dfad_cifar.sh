#!/usr/bin/env bash
# DFAD as Fast-Datafree's code runs it on CIFAR. Usage: --help.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh"
cifar_rows dfad "" "$@"
