#!/bin/sh
# Make the demo model from nothing: make_demo_model.sh WORK [OUTPUT]
# Needs a Debian 12 machine (apt-get, dpkg), a Python with requirements.txt ($PYTHON, default python3) and a C++
# compiler for torch.compile; about 1.4 CPU-hours. An interrupted run resumes when started again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
output=${2:-$work/demo-model}
python=${PYTHON:-python3}

packages="anarchism debian-handbook
    debian-reference-de fortunes-de gimp-help-de installation-guide-amd64 manpages-de
    libpython3.11-minimal libpython3.11-stdlib
    metamath-databases"
mkdir -p "$work/archives" "$work/packages"
for package in $packages; do
    if [ ! -d "$work/packages/$package" ]; then
        (cd "$work/archives" && apt-get download "$package")
        dpkg -x "$work/archives/${package}_"*.deb "$work/packages/$package"
    fi
done

[ -f "$work/corpora/metamath.heldout.jsonl" ] || "$python" "$here/corpora.py" "$work/packages" "$work/corpora"
[ -f "$work/model/tokenizer_config.json" ] || "$python" "$here/tokenizer.py" "$work/corpora" "$work/model"

# The step counts of the published run, which was bounded by time (--minutes). Threads must not spin while they wait
# for each other when other programs run.
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
"$python" "$here/train.py" seed "$work" --steps 1709
"$python" "$here/train.py" branch "$work" --domain english --steps 260
"$python" "$here/train.py" branch "$work" --domain german --steps 259
"$python" "$here/train.py" branch "$work" --domain python --steps 283
"$python" "$here/train.py" branch "$work" --domain metamath --steps 281
"$python" "$here/train.py" router "$work" --steps 179

"$python" "$here/export.py" "$work" "$output"
"$python" "$here/verify.py" "$output"
"$python" "$here/evaluate.py" "$work" "$output"
"$python" "$here/transcripts.py" "$output"
