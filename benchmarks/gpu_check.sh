#!/usr/bin/env bash
# Everything worth checking on a CUDA machine, without a network, in parts of at most five minutes on an H100, most
# important first; one line for each check, a summary at the end.
#   benchmarks/gpu_check.sh correctness [OUTPUT_FOLDER]   the tests marked `gpu`, the model and training tests of the CPU
#                                                         suite under this machine's torch, a matrix of small real runs
#   benchmarks/gpu_check.sh speed [OUTPUT_FOLDER]         the step of the 1B and 120M models beside litgpt, whose
#                                                         compilation takes most of the time
#   benchmarks/gpu_check.sh kernels [OUTPUT_FOLDER]       what each kernel is worth, float8, the largest batches, the whole
#                                                         trainer
#   benchmarks/gpu_check.sh ablations [OUTPUT_FOLDER]     long rows, layers of the 7B model, loss curves
#   benchmarks/gpu_check.sh [all] [OUTPUT_FOLDER]         the four, one after another
#   DEVICE=cpu benchmarks/gpu_check.sh ...                to try it without a GPU, at toy size; what needs one is skipped
# Environment: PYTHON; LITGPT, a Python with litgpt (default: PYTHON); LIMIT=290, seconds of a part: a check for which no
#   time is left is skipped; ONLY, a regular expression of the checks to run; WORKERS=8 and JOBS=5, processes of the CPU
#   suite's tests and of the matrix; TESTS and MATRIX_ONLY (a regular expression) choose among them.
# Needs: Python >= 3.11, torch >= 2.11, numpy, lightning-fabric, transformers, safetensors, tokenizers, pytest, pytest-xdist,
#   pytest-timeout, hypothesis and pyarrow zstandard jsonargparse pyyaml rich sentencepiece (and what they need); our packages
#   come from the checkout.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
part=all
case ${1:-} in correctness | speed | kernels | ablations | all) part=$1; shift ;; esac
out=${1:-gpu_check}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
mkdir -p "$out"
out=$(realpath "$out")
: >"$out/summary.txt"
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
limit=$((${LIMIT:-290} * slow_machine))

begin_part() {
    echo "== $1"
    part_began=$SECONDS
}

# check NAME SECONDS COMMAND...: run it, output in NAME.log, one line in the summary. RESULT, a command, adds to that line.
check() {
    local name=$1 most=$(($2 * slow_machine)) began=$SECONDS status=0 left
    shift 2
    [[ $name =~ ${ONLY:-} ]] || return 0
    left=$((limit - (SECONDS - part_began)))
    if [ "$left" -lt "$((20 * slow_machine))" ]; then
        echo "SKIP  $name: no time is left of $limit s" | tee -a "$out/summary.txt"
        return 0
    fi
    timeout "$((most < left ? most : left))" "$@" >"$out/$name.log" 2>&1 || status=$?
    if [ $status -eq 0 ]; then
        printf 'PASS  %-16s %4d s  %s\n' "$name" $((SECONDS - began)) "$(${RESULT:-true})"
    else
        printf 'FAIL  %-16s %4d s  status %d: %s\n' "$name" $((SECONDS - began)) $status "$(tail -n 1 "$out/$name.log")"
    fi | tee -a "$out/summary.txt"
}
last_line() { tail -n 1 "$out/$name.log"; }
table_lines() { grep '^|' "$out/$name.log" | sed 's/^/      /; 1s/^/\n/'; }

# --- correctness ------------------------------------------------------------------------------------------------------

correctness() {
    begin_part correctness
    # All three at once. The tests of the CPU suite see no GPU.
    # shellcheck disable=SC2086
    RESULT=last_line CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 check tests-cpu 285 "$python" -m pytest -q \
        -n "${WORKERS:-8}" --dist worksteal -p no:cacheprovider ${TESTS:-tests/model tests/training} &
    local tests=$!
    RESULT=last_line check tests-gpu 285 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/model tests/training &
    tests+=" $!"
    rm -rf "$out/matrix"
    RESULT=last_line check matrix 285 "$python" benchmarks/gpu_matrix.py --device "$device" --output "$out/matrix" \
        --jobs "${JOBS:-5}" ${MATRIX_ONLY:+--only "$MATRIX_ONLY"}
    [[ "matrix" =~ ${ONLY:-} ]] && grep -E "^(FAIL|SKIP)" "$out/matrix.log" | sed 's/^/      /' | tee -a "$out/summary.txt"
    # shellcheck disable=SC2086
    wait $tests
}

# --- speed ------------------------------------------------------------------------------------------------------------

# The rows of a step benchmark in one line each.
rows_of_step() {
    "$python" - "$out/$name.json" <<'PYTHON'
import json
import sys

with open(sys.argv[1]) as file:
    found = json.load(file)
for row in found["rows"]:
    shape = f"{row['name']} {row['rows']}x{row['tokens_a_row']}"
    if "failed" in row:
        print(f"\n      {shape}: {row['failed']}", end="")
        continue
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    ratio = "" if row["rate_to_ours"] is None else f", {row['rate_to_ours']:.3f} of ours on whole rows"
    print(f"\n      {shape}: {row['tokens_per_s']:,.0f} tokens/s{mfu}, {row['memory_gib']:.1f} GiB{ratio}", end="")
PYTHON
}

# step NAME SECONDS MODEL BATCHES FLAGS...: the step benchmark; at toy size on a CPU.
step() {
    local name=$1 seconds=$2 model=$3 batches=$4
    shift 4
    local size=(--model "$model" --compile --precision bf16 --steps 3 --rounds 4)
    if [ "$device" = cpu ]; then
        size=(--model debug --block_size 64 --document_tokens 40 --steps 1 --rounds 1 --warmup_steps 1 --threads 1)
        batches=2
    fi
    # shellcheck disable=SC2086
    RESULT=rows_of_step check "$name" "$seconds" "$python" benchmarks/train_step.py "${size[@]}" --batches $batches \
        --peer "litgpt=${LITGPT:-$python}" --json "$out/$name.json" "$@"
}

speed() {
    begin_part speed
    step 1B-equal 170 LLaMmlein_1B 4 --only llammlein llammlein-documents litgpt
    step 120M 120 LLaMmlein_120M 32 --only llammlein llammlein-documents litgpt
}

kernels() {
    begin_part kernels
    step 1B-kernels 90 LLaMmlein_1B 8 --only llammlein-documents \
        --ours "--train.attention varlen" --ours "--train.loss_kernel plain"
    step 1B-fp8 80 LLaMmlein_1B "8 12" --only --ours "--precision fp8"
    step 1B-largest 90 LLaMmlein_1B "12 16 24" --only llammlein-documents
    RESULT=last_line check trainer 110 "$python" - "$device" <<'PYTHON'
# The whole trainer, with its loader, record and metrics, at the shape of 1B-kernels.
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, ".")
from benchmarks.train_step import write_data

cuda = sys.argv[1] == "cuda"
model, tokens, rows, steps = ("LLaMmlein_1B", 2048, 8, 60) if cuda else ("debug", 64, 2, 4)
vocab = 32064 if cuda else 256
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_data(folder, vocab, 2 * rows * tokens * steps, 400)
    settings = {
        "data.train": folder / "data", "out_dir": folder / "run", "model.name": model, "devices": 1, "log.every_steps": 5,
        "train.max_steps": steps, "train.block_size": tokens, "train.global_batch_samples": rows,
        "train.micro_batch_samples": rows, "accelerator": sys.argv[1], "save.every_steps": 10 * steps, "log.report": "false",
    }
    if cuda:
        settings |= {"precision": "bf16", "compile": "true"}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "pretrain/fabric_train.py", *flags], check=True, stdout=sys.stderr)
    with open(folder / "run" / "metrics.csv", newline="") as file:
        speeds = [float(row["tokens_per_s"]) for row in csv.DictReader(file) if row["tokens_per_s"]]
print(f"{model} {rows}x{tokens}: {statistics.median(speeds[len(speeds) // 2:]):,.0f} tokens/s")
PYTHON
}

ablations() {
    begin_part ablations
    step 7B-layers 70 LLaMmlein_7B "2 4" --only llammlein-documents --layers "$([ "$device" = cuda ] && echo 16 || echo 2)"
    step long-rows 90 LLaMmlein_120M "8x8192 2x32768" --only llammlein-documents
    local curves=(--model LLaMmlein_120M --rows 16 --block_size 1024 --steps 300 --lr 6e-4)
    [ "$device" = cuda ] || curves=(--steps 4 --arms fp8)
    RESULT=table_lines check loss-curves 150 "$python" benchmarks/loss_curves.py --device "$device" "${curves[@]}" \
        --json "$out/loss-curves.json"
}

began=$SECONDS
for each in correctness speed kernels ablations; do
    if [ "$part" = all ] || [ "$part" = "$each" ]; then $each; fi
done
echo "== summary, $((SECONDS - began)) s; logs in $out"
cat "$out/machine.log" "$out/summary.txt"
! grep -q ^FAIL "$out/summary.txt"
