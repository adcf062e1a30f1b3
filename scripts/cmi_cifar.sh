#!/usr/bin/env bash
# CMI-500 (contrastive model inversion, 500 steps a batch) of Fast-Datafree's CIFAR tables. Usage: --help.
. "$(dirname "${BASH_SOURCE[0]}")/cifar_rows.sh" fast CMI-500 "$@"
