# shellcheck shell=bash
# Sourced by the jobs in this folder from the checkout: the paths of cluster/env, the image, and `container`, the
# arguments of `apptainer exec` up to the command. Exits if the job could not work.

if [ ! -f pretrain/fabric_train.py ]; then
    echo "error: $PWD is not the checkout; submit from there" >&2
    exit 2
fi
# Inherited from the shell that called sbatch; the ranks rendezvous on the job's first node.
unset MASTER_ADDR MASTER_PORT
# From its modules and environments: apptainer would pass them on, but the image has a different Python and libraries.
unset PYTHONPATH PYTHONHOME LD_LIBRARY_PATH
if [ -f cluster/env ]; then
    # shellcheck disable=SC1091
    . cluster/env
fi
image=${LLAMMLEIN_IMAGE:-$PWD/llammlein.sif}
if [ ! -e "$image" ]; then
    echo "error: no image at $image; build it with cluster/build_image.sh, or set LLAMMLEIN_IMAGE in cluster/env" >&2
    exit 2
fi
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it from sbatch
# shellcheck disable=SC2034 # used by the jobs
container=(--bind "$PWD${LLAMMLEIN_BIND:+,$LLAMMLEIN_BIND}" --pwd "$PWD" "$image")
