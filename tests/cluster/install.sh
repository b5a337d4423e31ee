#!/bin/sh
# A real Slurm for the tests, on Debian or Ubuntu, as root. No daemon is left running: the tests start their own.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
RUNLEVEL=1 apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client
