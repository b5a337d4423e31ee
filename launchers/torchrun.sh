#!/usr/bin/env bash
# Starts the ranks with torchrun.    launchers/torchrun.sh [doctor | train CONFIG KEY=VALUE... | any disttrain command]
CONFIG=configs/gpt_tiny.yaml
WORLD=(--standalone --nproc-per-node 2)
# On several hosts, run on each: WORLD=(--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400)
# Add --max-restarts 3 and ranks that are lost are started again, from the newest checkpoint.

[ $# -gt 0 ] || set -- train "$CONFIG"
exec torchrun "${WORLD[@]}" -m disttrain "$@"
