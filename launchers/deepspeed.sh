#!/usr/bin/env bash
# Starts the ranks with deepspeed.    launchers/deepspeed.sh [doctor | train CONFIG KEY=VALUE... | any disttrain command]
CONFIG=configs/gpt_tiny.yaml
WORLD=(--num_accelerators 2)
# On several hosts: WORLD=(--hostfile hosts), where the file has one line a host, such as: node1 slots=8

[ $# -gt 0 ] || set -- train "$CONFIG"
exec deepspeed "${WORLD[@]}" --no_local_rank --module disttrain "$@"
