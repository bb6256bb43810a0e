#!/bin/sh
# Measures gemmoe on this machine's GPU: tokens a second and kernels, beside the bandwidth and the tensor rates of the same
# run. Needs an NVIDIA driver, 530 or newer, and a GPU of compute capability 8.0 or newer; nothing else. cuBLAS is
# compared with where it is found.
#
#   ./run.sh                       all formats that fit, about eight minutes on an H100
#   ./run.sh --quick               fewer sizes, under two minutes
#   ./run.sh --format int4 ...     whatever bin/gpu-bench --help has; --cublas says where cuBLAS is
#
# Writes results/report.txt, results/figures.json and results/figures.svg.
set -u
cd "$(dirname "$0")" || exit 1
. ./machine.sh

mkdir -p results
keep_compiled_kernels "$PWD/compiled"
(describe_machine; check_c_library bin/gpu-bench) >results/report.txt 2>&1
status=$?
cat results/report.txt
[ "$status" -eq 0 ] || exit 1
echo >>results/report.txt
# In a file first: of a pipe the shell would know the last command's status alone.
bin/gpu-bench --json results/figures.json --svg results/figures.svg "$@" >results/measured.txt
status=$?
cat results/measured.txt
cat results/measured.txt >>results/report.txt
rm -f results/measured.txt
exit "$status"
