#!/usr/bin/env bash
# Prepare data in SLURM jobs: PARTS tasks in parallel, then one that merges their output. Run it on a login node, from
# the checkout. Flags before -- go to sbatch, the others to scripts/prepare_data.py:
#
#   cluster/prepare.sh 64 [--partition=cpu --cpus-per-task=16 --time=10:00:00] -- \
#       --input corpus/ --tokenizer tokenizer/ --output data
set -euo pipefail
if [ "$#" -lt 3 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]] || [[ " $* " != *" -- "* ]]; then
    echo "usage: $0 PARTS [flags of sbatch] -- flags of scripts/prepare_data.py" >&2
    exit 2
fi
parts=$1
shift
job=()
while [ "$1" != -- ]; do
    job+=("$1")
    shift
done
shift
if [[ " $* " == *" --parts"[\ =]* ]]; then
    echo "error: --parts is the first argument of $0" >&2
    exit 2
fi

if ! command -v sbatch >/dev/null; then
    echo "error: there is no sbatch here; without SLURM run scripts/prepare_data.py with --workers" >&2
    exit 2
fi

stages=(encode merge)
if [[ " $* " == *" --dedup exact "* || " $* " == *" --dedup=exact "* || " $* " == *" --near_dedup"[\ =]* ]]; then
    stages=(hash join encode merge)
fi
after=()
for stage in "${stages[@]}"; do
    array=()
    case $stage in hash | encode) array=(--array="0-$((parts - 1))") ;; esac
    # Otherwise the later stages would wait forever if a task fails.
    id=$(sbatch --parsable --kill-on-invalid-dep=yes "${job[@]}" "${array[@]}" "${after[@]}" \
        cluster/prepare.sbatch "$stage" --parts "$parts" "$@")
    id=${id%%;*} # with several clusters, the cluster name follows
    echo "$stage: job $id"
    after=(--dependency="afterok:$id")
done
