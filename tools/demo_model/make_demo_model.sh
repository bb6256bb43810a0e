#!/bin/sh
# Make the demo model from nothing: make_demo_model.sh WORK [OUTPUT]
# Needs a Debian 12 machine (apt-get, dpkg), a Python with requirements.txt ($PYTHON, default python3) and a C++
# compiler for torch.compile; about 1.2 hours on two cores. An interrupted run resumes when started again.
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

"$python" "$here/train.py" seed "$work" --minutes 36
for domain in english german python metamath; do
    "$python" "$here/train.py" branch "$work" --domain "$domain" --minutes 5.5
done
"$python" "$here/train.py" router "$work" --minutes 9

"$python" "$here/export.py" "$work" "$output"
"$python" "$here/verify.py" "$output"
"$python" "$here/evaluate.py" "$work" "$output"
"$python" "$here/transcripts.py" "$output"
