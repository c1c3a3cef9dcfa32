// A client in Go's standard library, written from PROTOCOL.md and the MessagePack specification: it has the agent make a data key
// for a key pair of its own, and unwraps it.
//
//	go run client.go SOCKET KEY_ID
//
// The output is a JSON object: CiphertextBlob, and DataKey in Base64. Of MessagePack, it writes what this request needs, and reads
// what an answer can have.
package main

import (
	"bufio"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"time"
)

const patience = 60 * time.Second

func main() {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	check(err)
	publicKey, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	check(err)
	result, err := call(os.Args[1], "GenerateAndExportDataKey", [][2]string{
		{"KeyId", os.Args[2]},
		{"PublicKeyBlob", base64.StdEncoding.EncodeToString(publicKey)},
		{"WrappingKeySpec", "RSA_2048"},
		{"WrappingAlgorithm", "RSAES_OAEP_SHA_256"},
	})
	check(err)
	wrapped, err := base64.StdEncoding.DecodeString(result["ExportedDataKey"].(string))
	check(err)
	dataKey, err := rsa.DecryptOAEP(sha256.New(), rand.Reader, key, wrapped, nil)
	check(err)
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{
		"CiphertextBlob": result["CiphertextBlob"],
		"DataKey":        base64.StdEncoding.EncodeToString(dataKey),
	}))
}

// call sends one request and returns its result, or the error that the agent answers.
func call(socket, method string, params [][2]string) (map[string]any, error) {
	connection, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))

	const msgid = 1
	request := []byte{0x94, 0x00, msgid} // an array of 4: request, msgid,
	request = appendString(request, method)
	request = append(request, 0x91, 0x80|byte(len(params))) // an array of 1: a map
	for _, pair := range params {
		request = appendString(appendString(request, pair[0]), pair[1])
	}
	// A write may fail because the agent has said why, and closed. The answer is read all the same.
	_, written := connection.Write(request)

	answer, err := decode(bufio.NewReader(connection))
	if err != nil {
		if written != nil {
			return nil, written
		}
		return nil, err
	}
	response, ok := answer.([]any)
	if !ok || len(response) != 4 || response[0] != int64(1) {
		return nil, fmt.Errorf("not a response: %v", answer)
	}
	if failure, ok := response[2].(map[string]any); ok {
		// The msgid is nil where the agent closes the connection with this answer.
		return nil, fmt.Errorf("%v: %v (request %v)", failure["Code"], failure["Message"], failure["RequestId"])
	}
	result, ok := response[3].(map[string]any)
	if !ok || response[1] != int64(msgid) {
		return nil, fmt.Errorf("not the answer to this request: %v", answer)
	}
	return result, nil
}

// appendString writes a str of at most 65,535 bytes.
func appendString(to []byte, text string) []byte {
	switch size := len(text); {
	case size < 32:
		to = append(to, 0xa0|byte(size))
	case size < 256:
		to = append(to, 0xd9, byte(size))
	default:
		to = binary.BigEndian.AppendUint16(append(to, 0xda), uint16(size))
	}
	return append(to, text...)
}

// decode reads one value: nil, bool, int64, string, []byte, []any or map[string]any.
func decode(from *bufio.Reader) (any, error) {
	mark, err := from.ReadByte()
	if err != nil {
		return nil, err
	}
	switch {
	case mark < 0x80:
		return int64(mark), nil
	case mark < 0x90:
		return decodeMap(from, uint64(mark&0x0f))
	case mark < 0xa0:
		return decodeArray(from, uint64(mark&0x0f))
	case mark < 0xc0:
		text, err := decodeBytes(from, uint64(mark&0x1f))
		return string(text), err
	case mark == 0xc0:
		return nil, nil
	case mark == 0xc2 || mark == 0xc3:
		return mark == 0xc3, nil
	case mark >= 0xe0:
		return int64(int8(mark)), nil
	}
	size, known := map[byte]int{
		0xc4: 1, 0xc5: 2, 0xc6: 4, // bin
		0xcc: 1, 0xcd: 2, 0xce: 4, 0xcf: 8, // unsigned
		0xd0: 1, 0xd1: 2, 0xd2: 4, 0xd3: 8, // signed
		0xd9: 1, 0xda: 2, 0xdb: 4, // str
		0xdc: 2, 0xdd: 4, // array
		0xde: 2, 0xdf: 4, // map
	}[mark]
	if !known {
		return nil, fmt.Errorf("the protocol has no %#x", mark)
	}
	digits, err := decodeBytes(from, uint64(size))
	if err != nil {
		return nil, err
	}
	number := binary.BigEndian.Uint64(append(make([]byte, 8-size), digits...))
	switch {
	case mark <= 0xc6:
		return decodeBytes(from, number)
	case mark <= 0xcf:
		return int64(number), nil
	case mark <= 0xd3:
		unused := 64 - 8*size
		return int64(number<<unused) >> unused, nil
	case mark <= 0xdb:
		text, err := decodeBytes(from, number)
		return string(text), err
	case mark <= 0xdd:
		return decodeArray(from, number)
	}
	return decodeMap(from, number)
}

func decodeBytes(from io.Reader, size uint64) ([]byte, error) {
	if size > 65_536 {
		return nil, fmt.Errorf("%d bytes are more than a message has", size)
	}
	data := make([]byte, size)
	_, err := io.ReadFull(from, data)
	return data, err
}

func decodeArray(from *bufio.Reader, size uint64) (any, error) {
	values := []any{}
	for ; size > 0; size-- {
		value, err := decode(from)
		if err != nil {
			return nil, err
		}
		values = append(values, value)
	}
	return values, nil
}

func decodeMap(from *bufio.Reader, size uint64) (any, error) {
	values := map[string]any{}
	for ; size > 0; size-- {
		name, err := decode(from)
		if err != nil {
			return nil, err
		}
		text, ok := name.(string)
		if !ok {
			return nil, fmt.Errorf("a key of a map is %v", name)
		}
		if values[text], err = decode(from); err != nil {
			return nil, err
		}
	}
	return values, nil
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
