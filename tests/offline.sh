#!/usr/bin/env bash
# A laptop without a network: sets up from a bundle and runs lesson 01, in a network namespace of its own and with an
# empty home. Linux alone; needs a kernel that lets users make namespaces.
#
#   tests/offline.sh BUNDLE
set -euo pipefail
bundle=$(cd "$1" && pwd)
if [ -z "${CUT_OFF:-}" ]; then
    # Root inside, so that the loopback device can be brought up: Jupyter speaks to its kernels by it.
    exec env CUT_OFF=1 unshare --map-root-user --net "$0" "$bundle"
fi
ip link set lo up
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
export RUSTUP_HOME="${RUSTUP_HOME:-$HOME/.rustup}" PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
export HOME="$home"
unset CARGO_HOME COURSE_HOME CARGO_TARGET_DIR
cp -a "$bundle" "$home/bundle"
cd "$home/bundle/course"
if python3 -c 'import urllib.request; urllib.request.urlopen("https://pypi.org", timeout=5)' 2> /dev/null; then
    echo "error: the network can be reached" >&2
    exit 1
fi
cargo course lab --offline .. --no-browser > lab.log 2>&1 &
lab=$!
turns=0
until grep -q 'http://127.0.0.1:[0-9]*/lab' lab.log; do
    turns=$((turns + 1))
    if ! kill -0 $lab || [ $turns -gt 1800 ]; then
        cat lab.log >&2
        exit 1
    fi
    sleep 1
done
kill $lab
# What was set up without a network needs none from then on, without a word of it.
cargo course run 01
