#!/bin/sh
# Unwraps an ExportedDataKey with the openssl program:
#
#     unwrap.sh KEY.der RSAES_OAEP_SHA_256|RSAES_OAEP_SHA_1 < ExportedDataKey
#
# KEY.der is the private key as PKCS#8; the output is the data key in Base64.
set -eu
key=$1
digest=sha256
[ "$2" != RSAES_OAEP_SHA_1 ] || digest=sha1
unwrap() {
    # [shown in PROTOCOL.md]
    # digest=sha256 for RSAES_OAEP_SHA_256, sha1 for RSAES_OAEP_SHA_1
    openssl base64 -d -A | openssl pkeyutl -decrypt -inkey "$key" \
        -pkeyopt rsa_padding_mode:oaep -pkeyopt "rsa_oaep_md:$digest" -pkeyopt "rsa_mgf1_md:$digest"
    # [end]
}
unwrap | openssl base64 -A
