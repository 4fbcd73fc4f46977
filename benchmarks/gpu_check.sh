#!/usr/bin/env bash
# Everything worth checking on a CUDA machine, in under eight minutes and without a network: the tests marked `gpu`, a short
# training run with a resume, then the step benchmark at 120M and 1B in bf16 with compile.
# Needs: Python >= 3.11, torch >= 2.11, numpy, lightning, transformers, safetensors, tokenizers, pytest, and
#   pyarrow zstandard jsonargparse pyyaml rich sentencepiece (and what they need); our packages come from the checkout.
#   benchmarks/gpu_check.sh [OUTPUT_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:-gpu_check}
python=${PYTHON:-python}
mkdir -p "$out"
status=0
step() {
    local name=$1
    shift
    echo "== $name: $*"
    if ! timeout "$@" 2>&1 | tee "$out/$name.log"; then
        echo "== $name FAILED"
        status=1
    fi
}
export HF_HUB_OFFLINE=1
"$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())' | tee "$out/machine.log" ||
    { echo "no CUDA device: nothing to check"; exit 2; }
step tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
step debug 60 "$python" pretrain/fabric_train.py --config configs/debug.yaml --accelerator cuda --precision bf16 \
    --train.deterministic false --out_dir "$out/debug"
step step-120M 110 "$python" benchmarks/train_step.py --model LLaMmlein_120M --batch 32 --precision bf16 --compile \
    --steps 5 --rounds 5 --json "$out/step-120M.json"
step step-1B 140 "$python" benchmarks/train_step.py --model LLaMmlein_1B --batch 8 --precision bf16 --compile \
    --steps 3 --rounds 5 --json "$out/step-1B.json"
exit $status
