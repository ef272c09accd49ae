#!/usr/bin/env bash
# What only a GPU shows, in about nine minutes on an H100: bash benchmarks/gpu.sh DATASETS OUTPUT
# DATASETS holds the VOC folders bccd and foda. OUTPUT gets a log of each step, JSON files and the runs' metrics.
set -u
cd "$(dirname "$0")/.."
data=$1 out=$2
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg

# step NAME SECONDS COMMAND...: run it for so long at most, keep its output, and show the end of it.
step() {
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  echo "== $name: status $?, $((SECONDS - begun)) s"
  tail -n 12 "$out/$name.log" | cut -c 1-300
}
benchmark() { step "$1" "$2" python3 tools/benchmark.py "${@:3}" --device cuda; }

# Tests and trainings side by side.
step tests 240 python3 -m pytest -m gpu -q -p no:cacheprovider &
step foda 250 python3 tools/train.py configs/foda_resnet18.yaml "data.root=$data/foda" train.amp=bf16 train.batch_size=16 \
  train.lr=2e-3 train.warmup_steps=80 --output "$out/foda" &
step bccd 240 python3 tools/train.py "$data/bccd" --minutes 2 --offline --output "$out/bccd" &
wait
# The measurements have the machine for themselves.
large=(--batch 8 --sizes 800x1333 --dtype bf16 --matrix-size 8192)
benchmark stream 60 stream --weights "$out/bccd/best.safetensors" --images "$data/bccd/JPEGImages" --count 200 --batch-size 8 \
  --dtype bf16 --repeats 1 --output "$out/stream.json"
benchmark training 80 training "${large[@]}" --stock-channels-last --checkpointing --regions 512 --repeats 5 --output "$out/training.json"
benchmark inference 80 inference "${large[@]}" --stock-channels-last --proposals 1000 300 --repeats 5 --output "$out/inference.json"
benchmark single 60 inference "${large[@]}" --batch 1 --stock-channels-last --proposals 1000 300 --repeats 9 --output "$out/single.json"
benchmark compiled 90 inference "${large[@]}" --skip-stock --compile --proposals 300 --repeats 5 --output "$out/compiled.json"
benchmark profile 60 training --profile "$out/trace.json.gz" --config configs/foda_resnet18.yaml "data.root=$data/foda" \
  train.amp=bf16 train.batch_size=8
benchmark float32 60 inference "${large[@]}" --dtype float32 --proposals 1000 --repeats 3 --output "$out/inference_float32.json"
