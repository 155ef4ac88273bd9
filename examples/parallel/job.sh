#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
# Queued once more, the job goes on from its last checkpoint.
srun rlora fit --config configs/riemannion_loi.yaml --config examples/parallel/two_nodes.yaml --ckpt_path last
