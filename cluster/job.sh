# shellcheck shell=bash
# Read by the jobs of this folder from the checkout: the paths of cluster/env, the image, and `container`, the arguments
# of `apptainer exec` up to the command. Ends a job that could not work.

if [ ! -f pretrain/fabric_train.py ]; then
    echo "error: $PWD is not the checkout; submit from there" >&2
    exit 2
fi
# Of the shell that called sbatch; the ranks meet at the job's first node.
unset MASTER_ADDR MASTER_PORT
# Of its modules and environments: apptainer would pass them on, and the image has another Python and other libraries.
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
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it over from sbatch
# shellcheck disable=SC2034 # used by the jobs
container=(--bind "$PWD${LLAMMLEIN_BIND:+,$LLAMMLEIN_BIND}" --pwd "$PWD" "$image")
