#!/bin/bash
# What a machine with one NVIDIA GPU and no network can say, in at most 8 minutes:
#   bash benchmarks/gpu.sh OUT [WHEELS]
# WHEELS: a folder with wheels of what is not installed there. Each part has its own time and its own
# log in OUT; one that fails leaves the others alone.
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
    site=$(mktemp -d)
    part install 20 python3 -m pip install --no-index --no-deps --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site"
fi
nvidia-smi >"$OUT/device.txt" 2>&1
part tests 90 python3 -m pytest -m gpu -n 0 -rP
part decode 70 python3 benchmarks/decode.py --device "$DEVICE" --models ${MODELS:-tiny 0.5B 1.5B}
part train 130 python3 train.py --device "$DEVICE" --out "$OUT/run"
part step 90 python3 benchmarks/step.py --device "$DEVICE" --shapes ${SHAPES:-gpu-0.5b} --repeats 2
LONG="--models 0.5B 1.5B --measure 0.5B 1.5B --prompt 2048 --completion 512"
part memory 40 python3 benchmarks/memory.py --device "$DEVICE" $LONG
part checkpointing 40 python3 benchmarks/memory.py --device "$DEVICE" $LONG --checkpointing
