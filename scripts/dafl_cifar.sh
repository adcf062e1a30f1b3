#!/usr/bin/env bash
# DAFL of Fast-Datafree's CIFAR tables. Usage: --help.
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh" fast DAFL "$@"
