#!/usr/bin/env bash
# Trains on all GPUs of several machines, and goes on from the newest checkpoint if there is one.
#
#   sbatch --nodes 2 recipes/cluster/slurm.sh CONFIG OUTPUT_DIR
#
# CONFIG, the data, the model and OUTPUT_DIR are on a disk that every machine sees. See docs/distributed.md.
#SBATCH --job-name=codiemb
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300            # five minutes before its time is over: write a checkpoint, and queue again
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

export CONFIG=${1:?CONFIG, then OUTPUT_DIR} OUTPUT_DIR=${2:?OUTPUT_DIR after CONFIG}
export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RESUME=$(compgen -G "$OUTPUT_DIR/checkpoint-*" > /dev/null && echo --resume)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=290   # seconds from the signal to the kill, from torch 2.12; older ones keep 30
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # with more than one network; runs on GPUs use both libraries

# To the step, not to srun, which would kill it. SIGTERM is left alone, so that a job that is cancelled stays so.
stopped=no
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1

# One torchrun a machine. A machine that fails takes the others down at once.
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node gpu --master-addr "$FIRST" --master-port 29500 \
    -m codiemb train "$CONFIG" "output_dir=\"$OUTPUT_DIR\"" $RESUME' &
step=$! code=0
wait "$step" || code=$?
if [[ $stopped == yes ]]; then
    code=0
    wait "$step" || code=$?   # the first was ended by the signal
    RESUME=$(compgen -G "$OUTPUT_DIR/checkpoint-*" || true)
    [[ -e $OUTPUT_DIR/.finished || ( -e $OUTPUT_DIR/model && -z $RESUME ) ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
