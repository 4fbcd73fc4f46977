#!/usr/bin/env bash
# convert_to_hf.sh CHECKPOINT OUTPUT: convert a checkpoint (or a run folder) to a Hugging Face folder.
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: $0 CHECKPOINT OUTPUT [--tokenizer PATH]" >&2
    exit 2
fi
checkpoint=$1 output=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python}" "$here/convert_to_hf.py" --checkpoint "$checkpoint" --output "$output" "$@"
