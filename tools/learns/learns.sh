#!/bin/sh
# Does a mixture with a trained router beat what it is made of? learns.sh WORK GEMMOE, with GEMMOE the command-line tool.
# Three random seeds, each a dense seed of four domains and a feed-forward-only branch a domain, on bytes; then everything by
# the library. Needs what tools/demo_model needs; about half a CPU-hour. What is there already is not made again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
gemmoe=$(realpath "$2")
python=${PYTHON:-python3}
"$here/../demo_model/fetch_corpora.sh" "$1"
cd "$1"
mkdir -p learns
[ -d learns/texts ] || "$python" "$here/texts.py" corpora learns/texts

texts="--text english=learns/texts/english.heldout.jsonl --text german=learns/texts/german.heldout.jsonl
    --text python=learns/texts/python.heldout.jsonl --text mathematics=learns/texts/metamath.heldout.jsonl"
for seed in 1 2 3; do
    run=learns/$seed
    [ -f "$run/costs.json" ] || "$python" "$here/branches.py" corpora "$run" "$seed"
    cp "$here/mix.toml" "$here/train.toml" "$run"
    [ -d "$run/mixture" ] || "$gemmoe" mix "$run/mix.toml" --out "$run/mixture"
    [ -f "$run/router.patch" ] || "$gemmoe" train-router "$run/train.toml"
    [ -d "$run/average" ] || "$python" "$here/../demo_model/average.py" "$run"
    "$gemmoe" eval --context 128 --json $texts --model "mixture, untrained router=$run/mixture" \
        --router "mixture, trained router=$run/router.patch" --model "dense average=$run/average" \
        --model "seed=$run/seed" > "$run/results.json"
done
"$python" "$here/table.py" learns/1/results.json learns/2/results.json learns/3/results.json
