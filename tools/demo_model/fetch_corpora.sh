#!/bin/sh
# Fetch the Debian packages and make the corpora of them: fetch_corpora.sh WORK. What is there already is left alone.
# Needs a Debian 12 machine (apt-get, dpkg) and Python 3 ($PYTHON, default python3).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/archives" "$1/packages"
cd "$1"

packages="anarchism debian-handbook
    debian-reference-de fortunes-de gimp-help-de installation-guide-amd64 manpages-de
    libpython3.11-minimal libpython3.11-stdlib
    metamath-databases"
for package in $packages; do
    if [ ! -d "packages/$package" ]; then
        (cd archives && apt-get download "$package")
        dpkg -x "archives/${package}_"*.deb "packages/$package"
    fi
done
[ -f corpora/metamath.heldout.jsonl ] || "${PYTHON:-python3}" "$here/corpora.py" packages corpora
