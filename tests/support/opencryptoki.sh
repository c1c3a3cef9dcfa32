#!/bin/sh
# usage: unshare --mount --ipc --pid --fork --mount-proc opencryptoki.sh PIN FOLDER COMMAND...
# Runs a command beside opencryptoki's daemon, with a fresh soft token "ock" that nobody outside of these namespaces sees.
set -eu
pin=$1 folder=$2
shift 2
mount --make-rprivate /
cp -a /var/lib/opencryptoki "$folder/lib"
cp -a /run/lock/opencryptoki "$folder/lock"
mount --bind "$folder/lib" /var/lib/opencryptoki
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/lock
cp -a "$folder/lock" /run/lock/opencryptoki
pkcsslotd -f >"$folder/log" 2>&1 &
daemon=$!
trap 'kill $daemon' EXIT
tries=0
until [ -S /run/pkcsslotd.socket ]; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || { cat "$folder/log" >&2; exit 1; }
    sleep 0.1
done
tool() { pkcs11-tool --module "$(ls /usr/lib/*/pkcs11/libopencryptoki.so)" --slot-index 0 "$@" >&2; }
tool --init-token --label ock --so-pin 87654321
tool --login --login-type so --so-pin 87654321 --init-pin --new-pin "$pin"
"$@"
