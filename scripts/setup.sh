# Sourced by the other scripts, which it ends at their first error:   . scripts/setup.sh; setup [requirements files]
#
# `setup` goes to the repository's root, makes .venv there, installs what is missing of requirements.txt and the files
# named, and sets PY to the environment's Python. A second call is at once. PYTHON names an interpreter: one that has
# what requirements.txt names is taken as it is (on a machine without network); from another one .venv is made.
# Paths among a script's flags are taken from the repository's root, wherever it is called.

set -euo pipefail

setup() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  PY=${PYTHON-}
  if [ -n "$PY" ] && "$PY" -c 'import torch, torchvision, sklearn, matplotlib, tqdm, filelock' 2>/dev/null; then
    return
  fi
  PY=$PWD/.venv/bin/python
  local stamp wanted base
  stamp=.venv/installed
  wanted="$(cat requirements.txt "$@")"
  if "$PY" -c 'import torch' 2>/dev/null && [ -e "$stamp" ] &&
    [ -z "$(grep -vxFf "$stamp" <<<"$wanted" || true)" ]; then
    return
  fi
  # An environment that uv made has no pip.
  if ! { "$PY" -m pip --version || "$PY" -m ensurepip; } >/dev/null 2>&1; then
    for base in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10} ""; do
      "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
    done
    if [ -z "$base" ]; then
      echo "setup: no Python 3.10 or newer was found: install it, or name it in PYTHON" >&2
      exit 2
    fi
    if ! "$base" -m venv --clear .venv; then
      echo "setup: $base cannot make a virtual environment: install its venv package" \
        "(Debian and Ubuntu: apt install python3-venv)" >&2
      exit 2
    fi
  fi
  echo "setup: installing into .venv (several GB with PyTorch, once)"
  # visdom is published as source, and its build needs pkg_resources, which setuptools 82 dropped.
  "$PY" -m pip install --quiet "setuptools<81" wheel
  "$PY" -m pip install --quiet --no-build-isolation visdom ||
    echo "setup: visdom could not be installed: everything runs, without live curves" >&2
  grep -v '^visdom' <<<"$wanted" >.venv/requirements.txt
  "$PY" -m pip install --quiet -r .venv/requirements.txt
  echo "$wanted" >"$stamp"
}
