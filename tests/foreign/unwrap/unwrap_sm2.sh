#!/bin/sh
# Unwraps an ExportedDataKey under SM2PKE with the openssl program, and Python for the DER that it wants:
#
#     unwrap_sm2.sh KEY.der < ExportedDataKey
#
# KEY.der is the private key as PKCS#8; the output is the data key in Base64.
set -eu
key=$1
unwrap() {
    # [shown in PROTOCOL.md]
    to_der='import sys; from keyferry.sm2_ciphertext import raw_to_der as f; sys.stdout.buffer.write(f(sys.stdin.buffer.read()))'
    openssl base64 -d -A | python3 -c "$to_der" | openssl pkeyutl -decrypt -inkey "$key"
    # [end]
}
unwrap | openssl base64 -A
