#!/usr/bin/env bash
# Installs DeepSpeed beside the torch of a Python, without compiling any of its operators: disttrain needs none of them.
#   launchers/install_deepspeed.sh                           the python3 of PATH, or the active environment's
#   PYTHON=.venv/bin/python launchers/install_deepspeed.sh   another one
set -euo pipefail
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "$0")" && pwd)

"$PYTHON" -c 'import torch' 2>/dev/null || {
    echo "install_deepspeed.sh: $PYTHON has no torch; install disttrain first" >&2
    exit 2
}
# Without isolation: its build looks at the torch that is there, and would otherwise download another one.
CONSTRAINTS=(-c "$HERE/../constraints.txt")
[ -f "${CONSTRAINTS[1]}" ] || CONSTRAINTS=()
pip() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "${CONSTRAINTS[@]}" "$@"; }
pip 'setuptools>=70.1' wheel packaging ninja
pip --no-build-isolation 'deepspeed>=0.19.8,<0.20'
"$PYTHON" -c 'from importlib.metadata import version; print("DeepSpeed", version("deepspeed"), "is installed")'
