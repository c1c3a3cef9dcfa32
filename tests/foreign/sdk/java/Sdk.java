// The V2 SDK for Java, by the methods of its client: java -cp 'LIBRARIES/*' Sdk.java
//
// Each line of standard input is a request, and each line of the output its outcome: see lines.py.

import com.aliyun.kms20160120.Client;
import com.aliyun.tea.TeaException;
import com.aliyun.tea.TeaModel;
import com.aliyun.teaopenapi.models.Config;
import com.aliyun.teautil.models.RuntimeOptions;
import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.ToNumberPolicy;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.Map;

public class Sdk {
    private static final Gson GSON = new GsonBuilder().setObjectToNumberStrategy(ToNumberPolicy.LONG_OR_DOUBLE).create();

    public static void main(String[] arguments) throws Exception {
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        PrintStream output = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        Client client = null;
        RuntimeOptions runtime = null;
        for (String line; (line = input.readLine()) != null; ) {
            Map<String, Object> asked = map(GSON.fromJson(line, Map.class));
            Map<String, Object> outcome = new LinkedHashMap<>();
            try {
                if (asked.containsKey("client")) {
                    Map<String, Object> settings = map(asked.get("client"));
                    client = new Client(config(settings));
                    runtime = new RuntimeOptions();
                    if (settings.get("attempts") != null) {
                        runtime.setAutoretry(true).setMaxAttempts(((Number) settings.get("attempts")).intValue());
                    }
                    outcome.put("result", Map.of());
                } else {
                    outcome.put("result", call(client, runtime, (String) asked.get("action"), map(asked.get("parameters"))));
                }
            } catch (Exception error) {
                outcome.put("error", described(error instanceof InvocationTargetException ? error.getCause() : error));
            }
            output.println(GSON.toJson(outcome));
        }
    }

    private static Config config(Map<String, Object> settings) throws Exception {
        Config config = new Config()
            .setAccessKeyId((String) settings.get("access_key_id"))
            .setAccessKeySecret((String) settings.get("access_key_secret"))
            .setSecurityToken((String) settings.get("security_token"))
            .setEndpoint((String) settings.get("host"))
            .setProtocol((String) settings.get("protocol"))
            .setSignatureAlgorithm((String) settings.get("signature_algorithm"));
        if (settings.get("protocol").equals("https")) {
            config.setCa(Files.readString(Path.of((String) settings.get("ca"))));
        }
        return config;
    }

    private static Map<String, Object> call(Client client, RuntimeOptions runtime, String action, Map<String, Object> parameters)
            throws Exception {
        Class<?> type = Class.forName("com.aliyun.kms20160120.models." + action + "Request");
        TeaModel request = TeaModel.build(parameters, (TeaModel) type.getDeclaredConstructor().newInstance());
        String name = action.substring(0, 1).toLowerCase() + action.substring(1) + "WithOptions";
        Object response = Client.class.getMethod(name, type, RuntimeOptions.class).invoke(client, request, runtime);
        Method body = response.getClass().getMethod("getBody");
        return ((TeaModel) body.invoke(response)).toMap();
    }

    private static Map<String, Object> described(Throwable error) {
        Map<String, Object> described = new LinkedHashMap<>();
        described.put("Type", error.getClass().getSimpleName());
        described.put("Message", error.getMessage());
        if (error instanceof TeaException refused) {
            described.put("Code", refused.getCode());
            described.put("HttpStatus", refused.getStatusCode());
            described.put("RequestId", refused.getData() == null ? null : refused.getData().get("RequestId"));
        }
        return described;
    }

    @SuppressWarnings("unchecked")
    private static Map<String, Object> map(Object value) {
        return (Map<String, Object>) value;
    }
}
