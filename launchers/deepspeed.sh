#!/usr/bin/env bash
# Starts the ranks with deepspeed.   launchers/deepspeed.sh [doctor | train CONFIG KEY=VALUE... | any disttrain command]
CONFIG=configs/gpt_tiny.yaml
WORLD=(--num_accelerators 2)
# On several hosts: WORLD=(--hostfile hosts), where the file has one line a host, such as: node1 slots=8

[ $# -gt 0 ] || set -- train "$CONFIG"
# SIGTERM would end deepspeed and leave its ranks behind. SIGUSR1 to them, its children's children, saves a checkpoint.
set -m
trap 'pkill -USR1 -P "$(pgrep -d, -P $job)"' INT TERM HUP
deepspeed "${WORLD[@]}" --no_local_rank --module disttrain "$@" </dev/null &
job=$!
while wait $job; code=$?; kill -0 $job 2>/dev/null; do :; done
exit $code
