#!/usr/bin/env bash
# Builds Horovod against the torch of a Python (5 to 10 minutes on 2 cores) and installs it there; the wheel is kept, so
# that the next time takes seconds.
#   launchers/install_horovod.sh                           the python3 of PATH, or the active environment's
#   PYTHON=.venv/bin/python launchers/install_horovod.sh   another one
# HOROVOD_WITHOUT_MPI=1: gloo alone, also where there is an mpicc. HOROVOD_GPU_OPERATIONS=NCCL: reduce on GPUs.
# DISTTRAIN_WHEELS: folder of the wheels (~/.cache/disttrain/wheels). MAKEFLAGS: -j and the number of compilers.
set -euo pipefail
VERSION=0.28.1
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "$0")" && pwd)

refuse() { echo "install_horovod.sh: $1" >&2; exit "${2:-2}"; }
imports() { # whether Horovod is there with native code: an install without the right flags succeeds and has none
    (cd / && "$1" -c 'import sys, horovod.torch as hvd
sys.exit("it has no native code") if not hasattr(hvd, "init") else sys.exit(0 if hvd.gloo_built() else "it has no gloo")
') >/dev/null 2>"$BUILD/import.log"
}

PYTHON=$(command -v "$PYTHON") || refuse "there is no Python here; set PYTHON=path/to/python"
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
TORCH=$("$PYTHON" -c 'import torch; print(torch.__version__)' 2>/dev/null) ||
    refuse "$PYTHON has no torch, which Horovod is built against; install disttrain first"
TAG=$("$PYTHON" -c 'import sys, platform; print("cp%d%d-%s" % (*sys.version_info[:2], platform.machine()))')
MPI=gloo
if [ -z "${HOROVOD_WITHOUT_MPI:-}" ] && command -v mpicc >/dev/null; then
    MPI=$({ mpicc --showme:version 2>/dev/null || mpicc -v 2>&1; } | head -n 1 |
        sed 's/^mpicc: *//; s/(.*//; s/^mpicc for //; s/ version / /; s/ *$//' | tr 'A-Z /' 'a-z--')
fi
KEPT=${DISTTRAIN_WHEELS:-$HOME/.cache/disttrain/wheels}/horovod-$VERSION-$TAG-torch-$TORCH-$MPI${HOROVOD_GPU_OPERATIONS:+-$HOROVOD_GPU_OPERATIONS}
BUILD=$(mktemp -d)
trap 'rm -rf "$BUILD"' EXIT

CONSTRAINTS=()
[ ! -f "$HERE/../constraints.txt" ] || CONSTRAINTS=(-c "$HERE/../constraints.txt")
"$PYTHON" -m pip install --quiet --disable-pip-version-check "${CONSTRAINTS[@]}" \
    'setuptools>=70.1' packaging cloudpickle psutil pyyaml cffi || refuse "pip could not install what Horovod needs" 1

if ! ls "$KEPT"/horovod-*.whl >/dev/null 2>&1; then
    for tool in g++ cmake make; do
        command -v $tool >/dev/null || refuse "$tool is missing; install it (Debian: apt-get install g++ cmake make)"
    done
    echo "Building Horovod $VERSION for torch $TORCH with $MPI"
    # Horovod's CMake files ask for C++14 and torch's headers need C++17; CMake drops -std from CXXFLAGS.
    printf '#!/bin/sh\nexec g++ "$@" -std=c++17 -g0\n' >"$BUILD/cxx17"
    chmod +x "$BUILD/cxx17"
    [ "$MPI" != gloo ] || export HOROVOD_WITHOUT_MPI=1
    [ "$MPI" = gloo ] || export HOROVOD_WITH_MPI=1
    mkdir -p "$KEPT"
    CXX=$BUILD/cxx17 LDFLAGS=-s MAKEFLAGS=${MAKEFLAGS:--j$(nproc)} CMAKE_POLICY_VERSION_MINIMUM=3.5 \
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 \
        "$PYTHON" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --no-binary horovod \
        -w "$BUILD" "horovod==$VERSION" >"$KEPT/build.log" 2>&1 ||
        { tail -n 20 "$KEPT/build.log" >&2; refuse "the build failed; all of its output is in $KEPT/build.log" 1; }
    mv "$BUILD"/horovod-*.whl "$KEPT/"
fi
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$KEPT"/horovod-*.whl ||
    refuse "pip could not install the wheel of $KEPT" 1
imports "$PYTHON" || refuse "Horovod was installed but does not work: $(tail -n 1 "$BUILD/import.log"); \
remove $KEPT and run this again" 1
cd /
"$PYTHON" -c 'import horovod, horovod.torch as hvd
has = [name for name, built in (("MPI", hvd.mpi_built()), ("gloo", hvd.gloo_built()), ("NCCL", hvd.nccl_built())) if built]
print("Horovod", horovod.__version__, "with", " and ".join(has), "is installed")'
