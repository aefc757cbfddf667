# SPDX-License-Identifier: Apache-2.0
# Sourced by short.sh and run.sh, with $here set to this folder and $folder to where the targets were built. POSIX sh.

# options_of <target>: libFuzzer's limits on the size of an input, and on what one allocation and the process may take.
options_of() {
    case $1 in
        format | rotate) length=80 ;;
        seal | open) length=200 ;;
        packing) length=300 ;;
        attend | npy) length=400 ;;
        file | cache | container | safetensors) length=2000 ;;
        saved) length=6000 ;;
        *) length=800 ;;
    esac
    case $1 in
        npy | file | container | safetensors | config | format | packing) megabytes=16 ;;
        *) megabytes=64 ;;
    esac
    printf '%s ' -max_len=$length -malloc_limit_mb=$megabytes -rss_limit_mb=2048 -timeout=60 -print_final_stats=1
    case $1 in
        config) dictionary=json ;;
        *) dictionary=$1 ;;
    esac
    [ ! -f "$here/dictionaries/$dictionary.dict" ] || printf '%s ' "-dict=$here/dictionaries/$dictionary.dict"
}

# Freed memory that AddressSanitizer keeps unusable; its default of 256 MB spoils the caches.
export ASAN_OPTIONS="quarantine_size_mb=16:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
