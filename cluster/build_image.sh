#!/usr/bin/env bash
# build_image.sh [--flash_attn REQUIREMENT] [IMAGE]: build llammlein.def into an Apptainer image (default: llammlein.sif in
# the checkout). REQUIREMENT selects flash-attn: `fa4` (the default: wheels), `none` (use torch's own attention),
# `compile` for the version of FA2 below, which takes hours, or the URL of a wheel of FA2 or FA3.
# Needs network access and about 30 GB of free space in APPTAINER_TMPDIR. On many clusters: run it on a build or login node.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
flash_attn=fa4
if [ "${1:-}" = --flash_attn ]; then
    flash_attn=${2:?--flash_attn needs a value}
    shift 2
fi
if [ "$flash_attn" = compile ]; then
    flash_attn=flash-attn==2.8.3.post2
fi
image=${1:-$root/llammlein.sif}
case $image in /*) ;; *) image=$PWD/$image ;; esac

if ! command -v apptainer >/dev/null; then
    echo "error: apptainer was not found; on a cluster often: module load apptainer" >&2
    exit 2
fi
if [ -e "$image" ]; then
    echo "error: $image exists already; remove it, or give another name" >&2
    exit 2
fi
cd "$root" # the definition refers to files in the checkout
# --fakeroot: needs no root access. The image gets its name only when it is complete.
apptainer build --fakeroot --build-arg "flash_attn=$flash_attn" "$image.part" llammlein.def
mv "$image.part" "$image"
echo "built $image"
