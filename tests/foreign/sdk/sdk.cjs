// The SDKs for Node: NODE_PATH=.../node_modules node sdk.cjs openapi-core|openapi-client|pop-core|pop-core-post|kms20160120
//
// Each line of standard input is a request, and each line of the output its outcome: see lines.py. NODE_EXTRA_CA_CERTS names the
// authority of the gateway for pop-core and kms20160120; the other two get it as a setting.
'use strict';
const fs = require('fs');
const readline = require('readline');

const [, , kind] = process.argv;
const VERSION = '2016-01-20';

// Both cores have `callApi`, which reaches every action.
function core(settings, {Client, Config, Params, OpenApiRequest, RuntimeOptions}) {
    const client = new Client(new Config({
        accessKeyId: settings.access_key_id,
        accessKeySecret: settings.access_key_secret,
        securityToken: settings.security_token,
        endpoint: settings.host,
        protocol: settings.protocol,
        ca: settings.protocol === 'https' ? fs.readFileSync(settings.ca, 'utf8') : undefined,
        signatureAlgorithm: settings.signature_algorithm,
    }));
    const runtime = new RuntimeOptions(settings.attempts ? {autoretry: true, maxAttempts: settings.attempts} : {});
    return async (action, parameters) => {
        const params = new Params({
            action, version: VERSION, protocol: settings.protocol, pathname: '/', method: 'POST', authType: 'AK', style: 'RPC',
            reqBodyType: 'formData', bodyType: 'json',
        });
        const {body} = await client.callApi(params, new OpenApiRequest({query: texts(parameters)}), runtime);
        return body;
    };
}

// Return parameters as texts: a context as its JSON, because a map would become EncryptionContext.name=value.
function texts(parameters) {
    return Object.fromEntries(Object.entries(parameters).map(
        ([name, value]) => [name, typeof value === 'object' ? JSON.stringify(value) : String(value)]));
}

const clients = {
    'openapi-core': settings => {
        const {default: Client, $OpenApiUtil} = require('@alicloud/openapi-core');
        const {RuntimeOptions} = require('@darabonba/typescript');
        return core(settings, {Client, RuntimeOptions, ...$OpenApiUtil});
    },
    'openapi-client': settings => {
        const {default: Client, Config, Params, OpenApiRequest} = require('@alicloud/openapi-client');
        const {RuntimeOptions} = require('@alicloud/tea-util');
        return core(settings, {Client, Config, Params, OpenApiRequest, RuntimeOptions});
    },
    'pop-core': settings => {
        const {RPCClient} = require('@alicloud/pop-core');
        const client = new RPCClient({
            accessKeyId: settings.access_key_id,
            accessKeySecret: settings.access_key_secret,
            securityToken: settings.security_token,
            endpoint: `${settings.protocol}://${settings.host}`,
            apiVersion: VERSION,
        });
        const opts = kind === 'pop-core-post' ? {method: 'POST'} : {};
        return (action, parameters) => client.request(action, texts(parameters), opts);
    },
    'kms20160120': settings => {
        const kms = require('@alicloud/kms20160120');
        const client = new kms.default({
            accessKeyId: settings.access_key_id,
            accessKeySecret: settings.access_key_secret,
            securityToken: settings.security_token,
            endpoint: settings.host,
            protocol: settings.protocol,
            regionId: 'cn-hangzhou',
        });
        return async (action, parameters) => {
            const method = action[0].toLowerCase() + action.slice(1);
            const fields = Object.entries(texts(parameters)).map(([name, value]) => [name[0].toLowerCase() + name.slice(1), value]);
            const request = new kms[`${action}Request`](Object.fromEntries(fields));
            const {RuntimeOptions} = require('@alicloud/tea-util');
            const runtime = new RuntimeOptions(settings.attempts ? {autoretry: true, maxAttempts: settings.attempts} : {});
            return (await client[`${method}Ex`](request, runtime)).toMap();
        };
    },
};
clients['pop-core-post'] = clients['pop-core'];

// Return what an exception of an SDK has.
function described(error) {
    const {statusCode, code, message, data = {}, entry} = error;
    return {
        Type: error.name,
        Code: kind === 'kms20160120' ? code?.replace(/Error$/, '') : code,  // that SDK adds the word to each code
        HttpStatus: statusCode ?? data.HttpStatus ?? data.statusCode ?? entry?.response.statusCode,
        Message: message,
        RequestId: data.RequestId ?? error.requestId,
    };
}

(async () => {
    let call;
    for await (const line of readline.createInterface({input: process.stdin})) {
        const asked = JSON.parse(line);
        let outcome;
        try {
            if (asked.client) {
                call = clients[kind](asked.client);
                outcome = {result: {}};
            } else {
                outcome = {result: await call(asked.action, asked.parameters)};
            }
        } catch (error) {
            outcome = {error: described(error)};
        }
        console.log(JSON.stringify(outcome));
    }
    process.exit(0);  // pop-core's connections would keep the process for some seconds
})();
