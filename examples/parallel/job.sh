#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=SIGUSR1@120
# Two minutes before the time is up, Lightning saves a checkpoint and queues the job once more.
srun rlora fit --config configs/riemannion_loi.yaml --config examples/parallel/two_nodes.yaml --ckpt_path last
