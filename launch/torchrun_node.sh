#!/usr/bin/env bash
# One node of a job with torchrun: call it on every node, with the same variables and options, in any order.
#   NNODES=2 RANKS=8 RENDEZVOUS=node1:29500 bash launch/torchrun_node.sh --config RECIPE --data.path FOLDER [--section.key value ...]
# NNODES          nodes of the job; a range such as 1:2 goes on with fewer (needs optim.global_batch_size)
# RANKS           processes on this node (default: all GPUs, or 2 CPU ranks)
# RENDEZVOUS      HOST:PORT where nodes meet (c10d): a node of the job with a free port
# MASTER          instead: HOST:PORT of node 0 with fixed addresses; NODE_RANK says which node this is
# MAX_RESTARTS    times that all ranks start again after a failure, from the last checkpoint (default 0)
# RDZV_ID         name of the job, where several meet at one place (default irtune)
# WAIT_SECONDS    patience for the other nodes (default 600)
# LOCAL_ADDR      this node's address, where that on the way to the meeting place is the wrong one
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python "$ROOT/launch/lib/rendezvous.py" "$@"
