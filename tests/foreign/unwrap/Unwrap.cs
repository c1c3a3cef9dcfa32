// Unwraps an ExportedDataKey with .NET (6 or later) alone. No test runs it: no test machine has .NET.
//
//     dotnet run KEY.der RSAES_OAEP_SHA_256|RSAES_OAEP_SHA_1 < ExportedDataKey
//
// KEY.der is the private key as PKCS#8; the output is the data key in Base64.

using System;
using System.IO;
using System.Security.Cryptography;

public static class Program
{
    // [shown in PROTOCOL.md]
    static byte[] Unwrap(RSA key, string algorithm, string exportedDataKey)
    {
        var padding = algorithm == "RSAES_OAEP_SHA_1" ? RSAEncryptionPadding.OaepSHA1 : RSAEncryptionPadding.OaepSHA256;
        return key.Decrypt(Convert.FromBase64String(exportedDataKey), padding);
    }
    // [end]

    public static void Main(string[] arguments)
    {
        using var key = RSA.Create();
        key.ImportPkcs8PrivateKey(File.ReadAllBytes(arguments[0]), out _);
        Console.WriteLine(Convert.ToBase64String(Unwrap(key, arguments[1], Console.In.ReadToEnd())));
    }
}
