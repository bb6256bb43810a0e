#!/bin/sh
# Make the demo model from nothing: make_demo_model.sh WORK GEMMOE, with GEMMOE the command-line tool (make cli).
# Needs a Debian 12 machine (apt-get, dpkg), a Python with requirements.txt ($PYTHON, default python3) and a C++
# compiler for torch.compile; about 1.4 CPU-hours. An interrupted run goes on when started again. WORK/demo-model is the
# result, WORK/router-training what examples/router-training has.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
examples=$(cd "$here/../../examples" && pwd)
gemmoe=$(realpath "$2")
python=${PYTHON:-python3}
"$here/fetch_corpora.sh" "$1"
cd "$1"

[ -f model/tokenizer_config.json ] || "$python" "$here/tokenizer.py" corpora model

# The step counts of the published run, which was bounded by time (--minutes). Threads must not spin while they wait
# for each other when other programs run.
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
"$python" "$here/train.py" seed . --steps 1709
"$python" "$here/train.py" branch . --domain english --steps 260
"$python" "$here/train.py" branch . --domain german --steps 259
"$python" "$here/train.py" branch . --domain python --steps 283
"$python" "$here/train.py" branch . --domain metamath --steps 281
"$python" "$here/export.py" .
"$python" "$here/average.py" dense

# From here on everything is the library's. Its recipes are the examples', but for where the model is.
sets=router-training
[ -d $sets ] || "$python" "$here/router_sets.py" packages corpora $sets
for recipe in sft dpo; do
    sed 's#"../../target/#"../#' "$examples/router-training/$recipe.toml" > $sets/$recipe.toml
done
cp "$here/mix.toml" .
[ -d mixed ] || "$gemmoe" mix mix.toml --out mixed
# The gates of DPO in a model directory: a run that goes on from the checkpoint behind its last step.
sed 's#^path = "../dpo.patch"#kind = "model"\npath = "../demo-model"\ncheckpoint = "../dpo.patch.checkpoint"#' \
    $sets/dpo.toml > $sets/model.toml
[ -f sft.patch ] || "$gemmoe" train-router $sets/sft.toml
for part in "" heldout-; do
    [ -f $sets/${part}pairs.jsonl ] || "$python" "$here/pairs.py" "$gemmoe" $sets/${part}prompts.jsonl \
        model/tokenizer.json $sets/${part}pairs.jsonl mixed sft.patch
done
[ -f dpo.patch ] || "$gemmoe" train-router $sets/dpo.toml
[ -d demo-model ] || "$gemmoe" train-router $sets/model.toml --resume

"$python" "$here/verify.py" demo-model
set -- --text $sets/all-heldout --context 264
"$gemmoe" eval --model mixed --router sft.patch --router dpo.patch "$@" --pairs $sets/heldout-pairs.jsonl \
    --reference sft.patch --model dense/seed --model dense/english --model dense/german --model dense/python \
    --model dense/metamath --model dense/average
"$python" "$here/transcripts.py" demo-model
