#!/usr/bin/env bash
# DFQ of Fast-Datafree's CIFAR tables. Usage: --help.
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh" fast DFQ "$@"
