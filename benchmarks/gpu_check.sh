#!/usr/bin/env bash
# Everything worth checking on a CUDA machine, without a network. First what is right, in under five minutes on an H100: the
# tests marked `gpu`, the model and training tests of the CPU suite under this machine's torch, and a matrix of small real
# runs. Then what is fast: the step benchmark at 120M and 1B in bf16 with compile, in under five minutes more.
# Needs: Python >= 3.11, torch >= 2.11, numpy, lightning-fabric, transformers, safetensors, tokenizers, pytest, pytest-xdist,
#   pytest-timeout, hypothesis and pyarrow zstandard jsonargparse pyyaml rich sentencepiece (and what they need); our packages
#   come from the checkout.
#   benchmarks/gpu_check.sh [OUTPUT_FOLDER]
#   DEVICE=cpu benchmarks/gpu_check.sh [OUTPUT_FOLDER]    # to try it without a GPU: what needs one says so and is skipped
#   ONLY=right (or fast) runs one part; WORKERS=12 and JOBS=4 are processes of the CPU suite's tests and of the matrix; TESTS
#   and MATRIX_ONLY (a regular expression) choose among them.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:-gpu_check}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
only=${ONLY:-right fast}
mkdir -p "$out"
out=$(realpath "$out")
status=0
step() {
    local name=$1
    shift
    echo "== $name: $*"
    if ! timeout "$@" 2>&1 | tee "$out/$name.log"; then
        echo "== $name FAILED"
        status=1
        return 1
    fi
}
export HF_HUB_OFFLINE=1
missing=$("$python" -c '
import importlib.util as util
names = "torch numpy lightning_fabric transformers safetensors tokenizers pytest xdist pytest_timeout hypothesis pyarrow"
names += " zstandard jsonargparse yaml rich sentencepiece"
print(*(name for name in names.split() if util.find_spec(name) is None))')
[ -z "$missing" ] || { echo "missing Python modules: $missing"; exit 2; }
if [ "$device" = cuda ]; then
    "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())' |
        tee "$out/machine.log" || { echo "no CUDA device: nothing to check (DEVICE=cpu tries the script)"; exit 2; }
    slow_machine=1
else
    "$python" -c 'import torch; print(torch.__version__, "CPU")' | tee "$out/machine.log"
    slow_machine=20 # times the limits in seconds
fi

if [[ $only == *right* ]]; then
    # Beside the other two: on CPUs alone, so that it leaves the GPU to them.
    CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 step tests-cpu $((290 * slow_machine)) "$python" -m pytest -q \
        -n "${WORKERS:-12}" --dist worksteal -p no:cacheprovider ${TESTS:-tests/model tests/training} >"$out/tests-cpu.out" &
    tests=$!
    step tests-gpu $((120 * slow_machine)) "$python" -m pytest -q -m gpu -p no:cacheprovider tests
    rm -rf "$out/matrix"
    step matrix $((170 * slow_machine)) "$python" benchmarks/gpu_matrix.py --device "$device" --output "$out/matrix" \
        --jobs "${JOBS:-4}" ${MATRIX_ONLY:+--only "$MATRIX_ONLY"}
    wait $tests || status=1
    tail -n 20 "$out/tests-cpu.out"
fi

if [[ $only == *fast* ]]; then
    if [ "$device" = cuda ]; then
        step step-120M 110 "$python" benchmarks/train_step.py --model LLaMmlein_120M --batch 32 --precision bf16 --compile \
            --steps 5 --rounds 5 --json "$out/step-120M.json"
        step step-1B 140 "$python" benchmarks/train_step.py --model LLaMmlein_1B --batch 8 --precision bf16 --compile \
            --steps 3 --rounds 5 --json "$out/step-1B.json"
    else
        echo "== the speed of 120M and 1B is skipped: it needs a GPU"
    fi
fi
exit $status
