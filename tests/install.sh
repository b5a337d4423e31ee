#!/usr/bin/env bash
# What `make test-real` wants beside the environment, on Debian or Ubuntu as root: a real Slurm, Open MPI and MPICH,
# DeepSpeed, and Horovod built against the environment's torch (5 to 10 minutes on 2 cores, once).
# `make test-real` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=$PWD/.venv/bin/python DEBIAN_FRONTEND=noninteractive
tests/cluster/install.sh
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends g++ cmake make openmpi-bin libopenmpi-dev iproute2 procps numactl libaio-dev
launchers/install_deepspeed.sh
launchers/install_horovod.sh
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --prefix .venv/mpich mpich==5.0.2
