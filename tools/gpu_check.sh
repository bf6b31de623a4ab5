#!/usr/bin/env bash
# Everything that needs a GPU: tests, benchmarks, short training runs. Results go to $OUT (default: gpu_check/).
#
#     tools/gpu_check.sh                    all parts, about half an hour
#     tools/gpu_check.sh tests benchmarks   some of: tests benchmarks biggan hrrformer
#
# Needs a Python with torch for CUDA; PYTHON names it. Packed data sets of tools.prepare_lra in $LRA_DATA (listops,
# imdb, cifar10 and pathfinder .safetensors) are trained on where they are there; ListOps is generated where it is not.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_check}
PYTHON=${PYTHON:-python3}
LRA_DATA=${LRA_DATA:-data/lra}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT"
parts=${*:-tests benchmarks biggan hrrformer}
failed=0

step() {  # step NAME COMMAND...: runs it, keeps its output, goes on after a failure
    local name=$1; shift
    echo "== $name: $*"
    if ! timeout "${STEP_SECONDS:-300}" "$@" >"$OUT/$name.log" 2>&1; then echo "FAILED: $name"; failed=1; fi
    tail -n 12 "$OUT/$name.log"
}

wanted() { [[ " $parts " == *" $1 "* ]]; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.txt"
runs=$(mktemp -d)

if wanted tests; then
    step tests "$PYTHON" -m pytest -q -m cuda tests
fi
if wanted benchmarks; then
    step attention_float32 "$PYTHON" -m tools.benchmark_attention --device cuda --json "$OUT/attention_cuda_float32.json"
    step attention_bfloat16 "$PYTHON" -m tools.benchmark_attention --device cuda --dtype bfloat16 --mechanisms smyrf \
        --lengths 4096,16384,65536,262144 --set smyrf.q_cluster_size=1024 --set smyrf.k_cluster_size=256 \
        --json "$OUT/attention_cuda_bfloat16.json"
    step peers_bfloat16 "$PYTHON" -m tools.benchmark_attention --device cuda --dtype bfloat16 --mechanisms all \
        --keys equal --head-dim 64 --lengths 1024,4096,16384 --json "$OUT/peers_cuda_bfloat16.json"
    step hrr "$PYTHON" -m tools.benchmark_attention --device cuda --mechanisms hrr --keys equal --head-dim 64 \
        --lengths 16384,131072 --json "$OUT/hrr_cuda_float32.json"
fi
if wanted biggan; then
    step demo "$PYTHON" -m biggan train --preset demo --device cuda --out "$runs/demo" --total-kimg 20
    step celebahq128_smyrf "$PYTHON" -m biggan train --preset celebahq128-smyrf --data drawn-faces --drawn-faces 256 \
        --device cuda --precision bfloat16 --out "$runs/celebahq128" --total-kimg 4 --log.kimg-per-tick 0.5 --log.grid 4
    for run in demo celebahq128; do
        cp "$runs/$run/stats.jsonl" "$OUT/$run.jsonl"
        cp "$(ls "$runs/$run"/samples/*.png | tail -n 1)" "$OUT/$run.png"
    done
fi
if wanted hrrformer; then
    if [[ ! -e "$LRA_DATA/listops.safetensors" ]]; then
        step listops_data "$PYTHON" -m tools.prepare_lra listops "$runs/listops-data"
    fi
    for task in listops:listops image:cifar10 text:imdb pathfinder:pathfinder; do
        data="$LRA_DATA/${task#*:}.safetensors" task=${task%:*}
        [[ $task == listops && ! -e "$data" ]] && data="$runs/listops-data"
        [[ -e "$data" ]] || { echo "== $task: not run, no $data"; continue; }
        step "hrrformer_$task" "$PYTHON" -m hrrformer train --task "$task" --preset single --data "$data" --device cuda \
            --out "$runs/$task"
        cp "$runs/$task/stats.jsonl" "$OUT/hrrformer_$task.jsonl"
    done
fi
exit $failed
