#!/usr/bin/env bash
# Starts the ranks with horovodrun.  launchers/horovodrun.sh [doctor | train CONFIG KEY=VALUE... | any disttrain command]
CONFIG=configs/gpt_tiny.yaml
WORLD=(-np 2)
# On several hosts, from the first of them: WORLD=(-np 16 -H node1:8,node2:8) and export MASTER_ADDR=node1 MASTER_PORT=29500

[ $# -gt 0 ] || set -- train "$CONFIG"
exec horovodrun "${WORLD[@]}" python -m disttrain "$@"
