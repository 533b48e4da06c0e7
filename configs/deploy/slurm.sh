#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Falcon-180B on two nodes of four A100-80G, TP4-PP2, under SLURM:
#
#   sbatch configs/deploy/slurm.sh /checkpoints/falcon-180b
#
# From a clone that all nodes see, with .venv made on one of them. A task a
# node; they find each other by what SLURM tells them, and know each other by a
# secret in the home directory. The first one serves, at port 50051 of the job's
# first node.
#SBATCH --job-name=sarathi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --signal=TERM@60
set -euo pipefail
checkpoint=${1:?the folder of a converted checkpoint}
# When one task ends with an error, none of the others is of use.
exec srun --kill-on-bad-exit=1 .venv/bin/python -m sarathi_jax.server \
  --checkpoint="$checkpoint" \
  --config=configs/falcon_180b_a100_tp4_pp2.py \
  --host=0.0.0.0 --port=50051 --distributed
