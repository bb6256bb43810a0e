#!/bin/sh
# Tests gemmoe's kernels and its CUDA backend on this machine's GPU, on the first device (CUDA_VISIBLE_DEVICES chooses).
# Needs an NVIDIA driver, 530 or newer, and a GPU of compute capability 8.0 or newer; nothing else.
#
#   ./run.sh                all tests, each in a process of its own; then, where compute-sanitizer is in PATH or in
#                           /usr/local/cuda/bin, the kernels under memcheck, racecheck, initcheck and synccheck
#   ./run.sh --quick        without sanitizers
#   ./run.sh --sanitizers   nothing but sanitizers, which have to be there
#
# Writes results/summary.txt and a log for each test beside it. The exit status is 0 where nothing failed.
set -u
cd "$(dirname "$0")" || exit 1
. ./machine.sh

with_tests=yes with_sanitizers=found
case "${1:-}" in
    "") ;;
    --quick) with_sanitizers=no ;;
    --sanitizers) with_tests=no with_sanitizers=yes ;;
    --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "$0: unknown option $1; --help lists them" >&2; exit 2 ;;
esac

rm -rf results
mkdir -p results/logs
summary=results/summary.txt
: >results/skipped; : >results/failed
passed=0 started=$(date +%s)
GEMMOE_TEST_DRIVER=hardware GEMMOE_TEST_ROOT=$PWD
export GEMMOE_TEST_DRIVER GEMMOE_TEST_ROOT
keep_compiled_kernels "$PWD/compiled"

say() { echo "$@" | tee -a "$summary"; }

(describe_machine; check_c_library bin/*) >>"$summary" 2>&1
status=$?
cat "$summary"
[ "$status" -eq 0 ] || exit 1

# Runs test $2 of bin/$1 with the rest of the arguments in front of it; answers its status. The log is $log.
run_test() {
    program=$1 test=$2
    shift 2
    log=results/logs/$program.$(echo "$test" | tr ':' '.').log
    timeout 1200 "$@" "bin/$program" --exact "$test" --nocapture --include-ignored >"$log" 2>&1
}

# Why a test failed: what it says of itself, or its last words.
why() {
    grep -a -A 4 -E 'panicked at|GEMMOE_SEED=|========= ERROR' "$1" | head -n 20 | sed 's/^/    /'
    [ -n "$(grep -a -E 'panicked at|========= ERROR' "$1")" ] || tail -n 5 "$1" | sed 's/^/    /'
}

# Without a device that is found nothing else can run.
if ! run_test cuda devices::the_device_has_a_name_and_no_observer; then
    say "no test can run: the driver gives no device that works"
    why "$log" | tee -a "$summary"
    exit 1
fi
say "tested: $(grep -a -o 'device 0: .*' "$log" | head -n 1)"

if [ "$with_tests" = yes ]; then
    for program in kernels cuda; do
        # A test that is ignored is there for the sanitizers.
        "bin/$program" --list --format terse | sed -n 's/: test$//p' >results/all
        "bin/$program" --list --format terse --ignored | sed -n 's/: test$//p' >results/ignored
        for test in $(grep -vxFf results/ignored results/all); do
            before=$(date +%s)
            if ! run_test "$program" "$test"; then
                echo "$program $test" >>results/failed
                say "FAILED   $program $test"
                why "$log" | tee -a "$summary"
            elif grep -a -q 'skipped: ' "$log"; then
                echo "$program $test: $(grep -a -o 'skipped: [^:]*' "$log" | sed 's/skipped: //;q')" >>results/skipped
            elif grep -a -q 'test result: ok. 1 passed' "$log"; then
                passed=$((passed + 1))
                echo "passed   $program $test, $(($(date +%s) - before)) s"
            else
                echo "$program $test" >>results/failed
                say "FAILED   $program $test: it did not run"
            fi
        done
    done
    rm -f results/all results/ignored
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ "$with_sanitizers" = no ]; then
    say "sanitizers: not asked for"
elif [ -z "$sanitizer" ]; then
    say "sanitizers: compute-sanitizer is not here"
    [ "$with_sanitizers" = found ] || echo "compute-sanitizer" >>results/failed
else
    watched="kernels:every_kernel_once cuda:every_golden_checkpoint_agrees_with_the_float64_reference"
    for tool in memcheck racecheck initcheck synccheck; do
        for pair in $watched; do
            # Each kernel under all of them; the whole backend where memory is what is watched.
            case "$tool $pair" in racecheck\ cuda:* | synccheck\ cuda:*) continue ;; esac
            program=${pair%%:*} test=${pair#*:}
            if run_test "$program" "$test" "$sanitizer" --tool "$tool" --error-exitcode 9 &&
                grep -a -q 'test result: ok. 1 passed' "$log"; then
                passed=$((passed + 1))
                say "passed   $tool, $program $test"
            else
                echo "$tool $program $test" >>results/failed
                say "FAILED   $tool, $program $test"
                why "$log" | tee -a "$summary"
            fi
            mv "$log" "results/logs/$tool.$program.$test.log"
        done
    done
fi

failed=$(wc -l <results/failed) skipped=$(wc -l <results/skipped)
if [ "$skipped" -gt 0 ]; then
    say "skipped, and so not tested here:"
    sed 's/^/    /' results/skipped | tee -a "$summary"
fi
say "$passed passed, $((failed)) failed, $((skipped)) skipped, $(($(date +%s) - started)) s"
rm -f results/skipped
[ "$failed" -eq 0 ] && rm -f results/failed
