// Unwraps an ExportedDataKey with Go's standard library:
//
//	go run unwrap.go KEY.der RSAES_OAEP_SHA_256|RSAES_OAEP_SHA_1 < ExportedDataKey
//
// KEY.der is the private key as PKCS#8; the output is the data key in Base64.
package main

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"os"
)

// [shown in PROTOCOL.md]
func unwrap(key *rsa.PrivateKey, algorithm, exportedDataKey string) ([]byte, error) {
	wrapped, err := base64.StdEncoding.DecodeString(exportedDataKey)
	if err != nil {
		return nil, err
	}
	if algorithm == "RSAES_OAEP_SHA_1" {
		return rsa.DecryptOAEP(sha1.New(), rand.Reader, key, wrapped, nil)
	}
	return rsa.DecryptOAEP(sha256.New(), rand.Reader, key, wrapped, nil)
}

// [end]

func main() {
	der, err := os.ReadFile(os.Args[1])
	check(err)
	key, err := x509.ParsePKCS8PrivateKey(der)
	check(err)
	exported, err := io.ReadAll(os.Stdin)
	check(err)
	dataKey, err := unwrap(key.(*rsa.PrivateKey), os.Args[2], string(exported))
	check(err)
	fmt.Println(base64.StdEncoding.EncodeToString(dataKey))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
