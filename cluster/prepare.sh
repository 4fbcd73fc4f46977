#!/usr/bin/env bash
# Prepare data in SLURM jobs: PARTS tasks in parallel, then one that merges their output. Run it on a login node, from
# the checkout. Flags before -- go to sbatch, the others to scripts/prepare_data.py:
#
#   cluster/prepare.sh 64 [--partition=cpu --cpus-per-task=16 --time=10:00:00] -- \
#       --input corpus/ --tokenizer tokenizer/ --output data
#
# With --dry_run before -- the calls of sbatch are printed and nothing is submitted.
set -euo pipefail
if [ "$#" -lt 3 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]] || [[ " $* " != *" -- "* ]]; then
    echo "usage: $0 PARTS [--dry_run] [flags of sbatch] -- flags of scripts/prepare_data.py" >&2
    exit 2
fi
parts=$1
shift
job=()
dry_run=
while [ "$1" != -- ]; do
    if [ "$1" = --dry_run ]; then dry_run=yes; else job+=("$1"); fi
    shift
done
shift
if [[ " $* " == *" --parts"[\ =]* ]]; then
    echo "error: --parts is the first argument of $0" >&2
    exit 2
fi
if [[ " $* " == *" --dry_run"[\ =]* ]]; then
    echo "error: give --dry_run before --: $0 PARTS --dry_run -- FLAGS" >&2
    exit 2
fi

if [ -z "$dry_run" ] && ! command -v sbatch >/dev/null; then
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
    submit=(sbatch --parsable --kill-on-invalid-dep=yes "${job[@]}" "${array[@]}" "${after[@]}"
        cluster/prepare.sbatch "$stage" --parts "$parts" "$@")
    if [ -n "$dry_run" ]; then
        printf '%s:%s\n' "$stage" "$(printf ' %q' "${submit[@]}")"
        id="ID_OF_${stage^^}"
    else
        id=$("${submit[@]}")
        id=${id%%;*} # with several clusters, the cluster name follows
        echo "$stage: job $id"
    fi
    after=(--dependency="afterok:$id")
done
