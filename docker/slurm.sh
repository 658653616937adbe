#!/bin/bash
# Extraction on the machines of a Slurm job, one Ray node each: the batch script runs on the first, which is the head.
#
#   sbatch --nodes=4 --cpus-per-task=16 --gpus-per-node=1 docker/slurm.sh shards/train maps/train \
#       --teacher deit_base_patch16_224 --weights teacher.safetensors
#
# `ray` and `zpipe` must be on the PATH (activate the environment in ~/.bashrc, or before sbatch), and all machines must
# reach the folders. After a time limit the same command resumes.
#SBATCH --job-name=zpipe-maps
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@60
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: sbatch [...] slurm.sh SHARDS STORE [options of zpipe extract-teacher-maps]" >&2
    exit 2
fi
shards=$1
store=$2
shift 2

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
address=$head:$((20000 + SLURM_JOB_ID % 12000))
# Only this job's processes may speak with this job's Ray; srun hands the environment on.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
common=(--num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory=83886080 --block)

begun=()
zpipe=
# Slurm ends what is left with the job; where it was cancelled, nothing should stay behind either.
trap 'kill "${begun[@]}" 2>/dev/null; wait' EXIT
trap 'if [ "$zpipe" ]; then kill -TERM "$zpipe"; fi' TERM

srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --port="${address##*:}" --include-dashboard=false "${common[@]}" &
begun+=($!)
for try in $(seq 60); do
    if ray health-check --address "$address" >/dev/null 2>&1; then
        break
    elif [ "$try" = 60 ]; then
        echo "error: no Ray at $address after $SECONDS s; look above for what it said" >&2
        exit 1
    fi
    sleep 2
done
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
        ray start --address="$address" "${common[@]}" &
    begun+=($!)
fi

zpipe extract-teacher-maps "$shards" --out "$store" --address "$address" "$@" &
zpipe=$!
code=0
wait "$zpipe" || code=$?
while kill -0 "$zpipe" 2>/dev/null; do # it was the signal that ended the wait, and zpipe is putting its work down
    code=0
    wait "$zpipe" || code=$?
done
exit "$code"
