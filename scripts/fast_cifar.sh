#!/usr/bin/env bash
# Fast-2, Fast-5 and Fast-10 of Fast-Datafree's CIFAR tables. Usage: --help.
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh" fast Fast-2,Fast-5,Fast-10 "$@"
