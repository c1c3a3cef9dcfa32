// Unwraps an ExportedDataKey under SM2PKE with github.com/emmansun/gmsm:
//
//	go run . KEY.der [C1C2C3] < ExportedDataKey
//
// KEY.der is the private key as PKCS#8; the output is the data key in Base64. With C1C2C3, the input is in that order.
package main

import (
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
)

// [shown in PROTOCOL.md]
func unwrap(key *sm2.PrivateKey, exportedDataKey string) ([]byte, error) {
	wrapped, err := base64.StdEncoding.DecodeString(exportedDataKey)
	if err != nil {
		return nil, err
	}
	return sm2.Decrypt(key, wrapped)
}

// [end]

func main() {
	der, err := os.ReadFile(os.Args[1])
	check(err)
	parsed, err := smx509.ParsePKCS8PrivateKey(der)
	check(err)
	key := parsed.(*sm2.PrivateKey)
	exported, err := io.ReadAll(os.Stdin)
	check(err)
	var dataKey []byte
	if len(os.Args) > 2 {
		wrapped, err := base64.StdEncoding.DecodeString(string(exported))
		check(err)
		dataKey, err = key.Decrypt(nil, wrapped, sm2.NewPlainDecrypterOpts(sm2.C1C2C3))
		check(err)
	} else {
		dataKey, err = unwrap(key, string(exported))
		check(err)
	}
	fmt.Println(base64.StdEncoding.EncodeToString(dataKey))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
