#!/usr/bin/env bash
# Several nodes with DeepSpeed's launcher, started from one of them (or from a login node).
#   HOSTFILE=hostfile bash launch/multinode_deepspeed.sh --config RECIPE --data.path FOLDER [--section.key value ...]
# HOSTFILE   a line `HOST slots=RANKS` per node, see launch/hostfile.example
# LAUNCHER   ssh (default): DeepSpeed's launcher is started on each host over ssh; pdsh: by `deepspeed --hostfile`
# SSH        the ssh command with options (default ssh); it must not ask for a password
# MASTER     address of the first host (default: its own on the way to the second)
# PORT       free port of the first host (default 29500)
# FORWARD    names of more variables that the ranks get; those of IRTUNE_, OMP_, GLOO_, NCCL_ and some more always reach
#            them, those of .deepspeed_env too
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python "$ROOT/launch/lib/hosts.py" "$@"
