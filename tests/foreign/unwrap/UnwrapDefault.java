// The mistake that Unwrap.java avoids: without parameters, the JDK's OAEPWithSHA-256AndMGF1Padding uses SHA-1 in MGF1.
//
//     java UnwrapDefault.java KEY.der < ExportedDataKey

import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Base64;
import javax.crypto.BadPaddingException;
import javax.crypto.Cipher;

public class UnwrapDefault {
    public static void main(String[] arguments) throws Exception {
        var key = new PKCS8EncodedKeySpec(Files.readAllBytes(Path.of(arguments[0])));
        var cipher = Cipher.getInstance("RSA/ECB/OAEPWithSHA-256AndMGF1Padding");
        cipher.init(Cipher.DECRYPT_MODE, KeyFactory.getInstance("RSA").generatePrivate(key));
        try {
            cipher.doFinal(Base64.getDecoder().decode(System.in.readAllBytes()));
            System.out.println("unwrapped");
        } catch (BadPaddingException error) {
            System.out.println(error.getMessage());
        }
    }
}
