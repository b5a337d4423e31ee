#!/usr/bin/env bash
# Starts the ranks with mpirun (Open MPI, MPICH).  launchers/mpirun.sh [doctor | train CONFIG KEY=VALUE... | any command]
CONFIG=configs/gpt_tiny.yaml
WORLD=(-n 2)
# On several hosts: WORLD=(-n 16 --host node1:8,node2:8), with mpi4py installed

[ $# -gt 0 ] || set -- train "$CONFIG"
# Open MPI kills its ranks one second after Ctrl-C. SIGUSR1 it hands on to them, and they save a checkpoint.
set -m
trap 'kill -USR1 $job' INT TERM HUP
mpirun --bind-to none "${WORLD[@]}" python -m disttrain "$@" </dev/null &
job=$!
while wait $job; code=$?; kill -0 $job 2>/dev/null; do :; done
exit $code
