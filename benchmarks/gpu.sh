#!/bin/bash
# What a machine with one NVIDIA GPU and no network can say, in at most 8 minutes:
#   bash benchmarks/gpu.sh OUT [WHEELS]
# WHEELS: a folder with the wheels of requirements-dev.txt, for what is not installed. Each part has
# its own time and its own log in OUT; one that fails leaves the others alone.
cd "$(dirname "$0")/.." || exit 1
OUT=${1:?a folder for the logs} WHEELS=$2 DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"

part() { # name, seconds, command
    name=$1 seconds=$2
    shift 2
    began=$SECONDS
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    echo "$name: exit status $?, $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
}

if [ -n "$WHEELS" ]; then
    part install 60 python -m pip install --no-index --find-links "$WHEELS" -r requirements-dev.txt
fi
nvidia-smi >"$OUT/device.txt" 2>&1
part decode 60 python benchmarks/decode.py --device "$DEVICE" --models ${MODELS:-0.5B 1.5B}
part memory 60 python benchmarks/memory.py --device "$DEVICE" --models 0.5B --measure 0.5B
part train 150 python train.py --device "$DEVICE" --out "$OUT/run"
part step 90 python benchmarks/step.py --device "$DEVICE" --shapes ${SHAPES:-gpu-0.5b gpu-1.5b}
part tests 120 python -m pytest -q
