#!/usr/bin/env bash
# Everything that needs a GPU, in one run: the CUDA tests, the attention benchmark, two short training runs.
# Results go to $OUT (default: gpu_check/). Needs a Python with torch for CUDA; PYTHON names it.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_check}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=0

step() {  # step NAME COMMAND...: runs it, keeps its output, goes on after a failure
    local name=$1; shift
    echo "== $name: $*"
    if ! timeout "${STEP_SECONDS:-150}" "$@" >"$OUT/$name.log" 2>&1; then echo "FAILED: $name"; failed=1; fi
    tail -n 12 "$OUT/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.txt"
step tests "$PYTHON" -m pytest -q -m cuda tests
step attention_float32 "$PYTHON" -m tools.benchmark_attention --device cuda --json "$OUT/attention_float32.json"
step attention_bfloat16 "$PYTHON" -m tools.benchmark_attention --device cuda --dtype bfloat16 \
    --q-length 65536 --k-length 16384 --q-cluster-size 1024 --k-cluster-size 256 --json "$OUT/attention_bfloat16.json"
runs=$(mktemp -d)
step demo "$PYTHON" -m biggan train --preset demo --device cuda --out "$runs/demo" --total-kimg 20
step celebahq128_smyrf "$PYTHON" -m biggan train --preset celebahq128-smyrf --data drawn-faces --drawn-faces 256 \
    --device cuda --precision bfloat16 --out "$runs/celebahq128" --total-kimg 4 --log.kimg-per-tick 0.5 --log.grid 4
for run in demo celebahq128; do
    cp "$runs/$run/stats.jsonl" "$OUT/$run.jsonl"
    cp "$(ls "$runs/$run"/samples/*.png | tail -n 1)" "$OUT/$run.png"
done
exit $failed
