// Unwraps an ExportedDataKey with the JDK alone:
//
//     java Unwrap.java KEY.der RSAES_OAEP_SHA_256|RSAES_OAEP_SHA_1 < ExportedDataKey
//
// KEY.der is the private key as PKCS#8; the output is the data key in Base64.

import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.PrivateKey;
import java.security.spec.MGF1ParameterSpec;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Base64;
import javax.crypto.Cipher;
import javax.crypto.spec.OAEPParameterSpec;
import javax.crypto.spec.PSource;

public class Unwrap {
    // [shown in PROTOCOL.md]
    static final OAEPParameterSpec RSAES_OAEP_SHA_256 =
            new OAEPParameterSpec("SHA-256", "MGF1", MGF1ParameterSpec.SHA256, PSource.PSpecified.DEFAULT);
    static final OAEPParameterSpec RSAES_OAEP_SHA_1 =
            new OAEPParameterSpec("SHA-1", "MGF1", MGF1ParameterSpec.SHA1, PSource.PSpecified.DEFAULT);

    static byte[] unwrap(PrivateKey key, OAEPParameterSpec algorithm, String exportedDataKey) throws GeneralSecurityException {
        Cipher cipher = Cipher.getInstance("RSA/ECB/OAEPPadding");
        cipher.init(Cipher.DECRYPT_MODE, key, algorithm);
        return cipher.doFinal(Base64.getDecoder().decode(exportedDataKey));
    }
    // [end]

    public static void main(String[] arguments) throws Exception {
        var key = new PKCS8EncodedKeySpec(Files.readAllBytes(Path.of(arguments[0])));
        var algorithm = arguments[1].equals("RSAES_OAEP_SHA_256") ? RSAES_OAEP_SHA_256 : RSAES_OAEP_SHA_1;
        var exported = new String(System.in.readAllBytes());
        var dataKey = unwrap(KeyFactory.getInstance("RSA").generatePrivate(key), algorithm, exported);
        System.out.println(Base64.getEncoder().encodeToString(dataKey));
    }
}
