#!/bin/sh
# Is everything there that the set-up needs from the system? Usage: tools/check_system.sh PYTHON [--packages]
# Prints the one apt line that is missing and ends with 2; with --packages only the missing packages, ending with 0.
set -eu

python=${1:-python3}
case $(pwd) in *' '*)
    echo "rim_dist: the path $(pwd) has a space in it, where PyTorch cannot link DeepSpeed's ops; move the checkout" >&2
    exit 2
esac

missing=""
compiler=${CXX:-g++}

if ! "$python" -c '' 2>/dev/null; then
    case $python in */*)
        echo "rim_dist: $python does not run; PYTHON=/path/to/python3.11 names another" >&2
        exit 2
    esac
    missing="python3 python3-dev python3-venv"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "rim_dist: $python is $("$python" -V 2>&1); Python 3.11 or newer is needed, PYTHON=/path/to/python3.11 names one" >&2
    exit 2
else
    # Debian's packages of a Python that is not the system's own carry its version in their names.
    name=python3
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
        name=python$version
    fi
    headers='import os, sys, sysconfig; sys.exit(not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'
    "$python" -c "$headers" || missing="$missing $name-dev"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing $name-venv"
fi
command -v "${compiler%% *}" >/dev/null 2>&1 || missing="g++ $missing"
command -v make >/dev/null 2>&1 || missing="$missing make"

# shellcheck disable=SC2086  # a list of words
set -- "${2:-}" $missing
option=$1
shift
if [ "$option" = --packages ]; then
    echo "$*"
elif [ $# -gt 0 ]; then
    sudo=$([ "$(id -u)" -eq 0 ] || echo "sudo ")
    echo "rim_dist: missing on this system: $*. Install it with" >&2
    echo "    ${sudo}apt-get install -y $*" >&2
    exit 2
fi
