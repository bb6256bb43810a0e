# What both bundles ask of the machine they run on. For `. ./machine.sh` from a POSIX shell.

# 0 where version $1 is at least version $2, both of two numbers.
is_at_least() {
    [ "${1%%.*}" -gt "${2%%.*}" ] || { [ "${1%%.*}" -eq "${2%%.*}" ] && [ "${1#*.}" -ge "${2#*.}" ]; }
}

# Fails with a sentence where the C library is older than what the programs $@ were linked with.
check_c_library() {
    needed=$(grep -aoh 'GLIBC_2\.[0-9]*' "$@" | sed 's/GLIBC_//' | sort -u -t. -k2,2n | tail -n 1)
    found=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/[^0-9]*//')
    if [ -z "$found" ]; then
        echo "this machine's C library is not glibc; the programs need glibc $needed or newer" >&2
        exit 1
    fi
    if ! is_at_least "$found" "$needed"; then
        echo "this machine has glibc $found, the programs need $needed: build the bundle on an older system" >&2
        exit 1
    fi
    echo "glibc $found (needed: $needed)"
}

# Date, system, devices and driver, one a line.
describe_machine() {
    echo "date: $(date -u '+%Y-%m-%d %H:%M UTC')"
    echo "system: $(uname -srm)"
    if [ -r /proc/driver/nvidia/version ]; then
        echo "driver: $(head -n 1 /proc/driver/nvidia/version)"
    fi
    if command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi --query-gpu=index,name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit \
            --format=csv,noheader | sed 's/^/device: /'
    fi
}

# Code that the driver compiled is kept in the bundle, where the next process finds it.
keep_compiled_kernels() {
    mkdir -p "$1"
    CUDA_CACHE_PATH=$1 CUDA_CACHE_MAXSIZE=1073741824
    export CUDA_CACHE_PATH CUDA_CACHE_MAXSIZE
}
