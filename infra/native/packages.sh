#!/bin/sh
# Installs the Debian packages that the stack and its tests run, where they are missing: as root
# itself, else it says what to ask for.
set -eu

missing=
command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
    || missing="$missing postgresql"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing$missing, once"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -qq -y --no-install-recommends $missing >/dev/null
else
    echo "make:$missing is missing (Debian: sudo apt-get install$missing)" >&2
    exit 1
fi
