// The V2 SDK for Go, by the methods of its client.
//
// Each line of standard input is a request, and each line of the output its outcome: see lines.py.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"

	openapi "github.com/alibabacloud-go/darabonba-openapi/v2/client"
	kms "github.com/alibabacloud-go/kms-20160120/v3/client"
	util "github.com/alibabacloud-go/tea-utils/v2/service"
	"github.com/alibabacloud-go/tea/tea"
)

type settings struct {
	ID        string `json:"access_key_id"`
	Secret    string `json:"access_key_secret"`
	Token     string `json:"security_token"`
	Host      string `json:"host"`
	Protocol  string `json:"protocol"`
	CA        string `json:"ca"`
	Algorithm string `json:"signature_algorithm"`
	Attempts  int    `json:"attempts"`
}

type asked struct {
	Client     *settings       `json:"client"`
	Action     string          `json:"action"`
	Parameters json.RawMessage `json:"parameters"`
}

type call func(action string, parameters json.RawMessage) (any, error)

// newClient returns a function that finds the method of an action, and fills its request.
func newClient(given settings) (call, error) {
	config := &openapi.Config{
		AccessKeyId:     &given.ID,
		AccessKeySecret: &given.Secret,
		Endpoint:        &given.Host,
		Protocol:        &given.Protocol,
	}
	if given.Token != "" {
		config.SecurityToken = &given.Token
	}
	if given.Algorithm != "" {
		config.SignatureAlgorithm = &given.Algorithm
	}
	if given.Protocol == "https" {
		authority, err := os.ReadFile(given.CA)
		if err != nil {
			return nil, err
		}
		config.Ca = tea.String(string(authority))
	}
	client, err := kms.NewClient(config)
	if err != nil {
		return nil, err
	}
	runtime := &util.RuntimeOptions{}
	if given.Attempts > 0 {
		runtime.Autoretry = tea.Bool(true)
		runtime.MaxAttempts = &given.Attempts
	}
	return func(action string, parameters json.RawMessage) (any, error) {
		method := reflect.ValueOf(client).MethodByName(action + "WithOptions")
		if !method.IsValid() {
			return nil, fmt.Errorf("the client has no method %s", action)
		}
		request := reflect.New(method.Type().In(0).Elem())
		if err := json.Unmarshal(parameters, request.Interface()); err != nil {
			return nil, err
		}
		answers := method.Call([]reflect.Value{request, reflect.ValueOf(runtime)})
		if failure, _ := answers[1].Interface().(error); failure != nil {
			return nil, failure
		}
		return answers[0].Elem().FieldByName("Body").Interface(), nil
	}, nil
}

// describe returns what an error of an SDK has.
func describe(failure error) map[string]any {
	described := map[string]any{"Type": fmt.Sprintf("%T", failure), "Message": failure.Error()}
	var refused *tea.SDKError
	if errors.As(failure, &refused) {
		described["Code"] = tea.StringValue(refused.Code)
		described["HttpStatus"] = tea.IntValue(refused.StatusCode)
		described["Message"] = tea.StringValue(refused.Message)
		var data map[string]any
		if json.Unmarshal([]byte(tea.StringValue(refused.Data)), &data) == nil {
			described["RequestId"] = data["RequestId"]
		}
	}
	return described
}

func main() {
	input := bufio.NewScanner(os.Stdin)
	input.Buffer(nil, 1<<20)
	output := json.NewEncoder(os.Stdout)
	var current call
	for input.Scan() {
		var line asked
		var result any = map[string]any{}
		failure := json.Unmarshal(input.Bytes(), &line)
		if failure == nil && line.Client != nil {
			current, failure = newClient(*line.Client)
		} else if failure == nil {
			result, failure = current(line.Action, line.Parameters)
		}
		if failure != nil {
			output.Encode(map[string]any{"error": describe(failure)})
		} else {
			output.Encode(map[string]any{"result": result})
		}
	}
}
