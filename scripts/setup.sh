#!/bin/sh
# Make the virtual environment $1 with the package and its tools; on Debian as root, also the
# system packages it needs. Elsewhere it says what to install and goes on where it can.
set -eu
venv=$1
system=$(uname -s)

debian_install() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$@" >/dev/null
  else
    echo "Please install: $* (Debian: sudo apt-get install $*)" >&2
    return 1
  fi
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python=
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
  if new_enough "$candidate"; then python=$candidate && break; fi
done
if [ -z "$python" ]; then
  echo "Python 3.11 or newer is needed; PYTHON=/path/to/python names one." >&2
  exit 1
fi

# Debian's python3 comes without ensurepip, which venv needs.
"$python" -c 'import ensurepip' 2>/dev/null || debian_install python3-venv
"$python" -m venv "$venv"

if [ "$system" = Linux ]; then
  # Optional: without OpenBLAS all works, about ten times slower, and the program says so.
  "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null ||
    debian_install libopenblas0-pthread || true
fi

"$venv/bin/pip" install --quiet --disable-pip-version-check --editable '.[cpu,dev]'
