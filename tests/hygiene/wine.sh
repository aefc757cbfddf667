# SPDX-License-Identifier: Apache-2.0
# Sourced. wine_start <folder>: from now on "$KVARN_WINE" <program> runs in a prefix of its own there. It has nothing in it, so that Wine
# neither copies its libraries nor starts services. wine_stop: ends what Wine still has running in that prefix, and removes it.
wine_start() {
    rm -rf "$1"
    mkdir -p "$1/dosdevices" "$1/drive_c/windows/system32"
    ln -s ../drive_c "$1/dosdevices/c:"
    ln -s / "$1/dosdevices/z:"
    echo disable >"$1/.update-timestamp"
    export WINEPREFIX="$1" WINEBOOTSTRAPMODE=1 WINEDEBUG=-all
}

wine_stop() {
    # It would wait some seconds for more programs, and write into the prefix then.
    server=$(dirname "$KVARN_WINE")/wineserver
    if [ -x "$server" ]; then
        "$server" -k || :
        "$server" -w || :
    fi
    rm -rf "$WINEPREFIX"
}
