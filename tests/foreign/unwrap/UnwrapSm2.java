// Unwraps an ExportedDataKey under SM2PKE with BouncyCastle (bcprov):
//
//     java -cp bcprov.jar UnwrapSm2.java KEY.der < ExportedDataKey
//
// KEY.der is the private key as PKCS#8; the output is the data key in Base64.

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Base64;
import org.bouncycastle.crypto.InvalidCipherTextException;
import org.bouncycastle.crypto.engines.SM2Engine;
import org.bouncycastle.crypto.util.PrivateKeyFactory;

public class UnwrapSm2 {
    // [shown in PROTOCOL.md]
    static byte[] unwrap(byte[] pkcs8, String exportedDataKey) throws IOException, InvalidCipherTextException {
        SM2Engine engine = new SM2Engine(SM2Engine.Mode.C1C3C2); // SM2Engine() is C1C2C3: "invalid cipher text"
        engine.init(false, PrivateKeyFactory.createKey(pkcs8));
        byte[] wrapped = Base64.getDecoder().decode(exportedDataKey);
        return engine.processBlock(wrapped, 0, wrapped.length);
    }
    // [end]

    public static void main(String[] arguments) throws Exception {
        var dataKey = unwrap(Files.readAllBytes(Path.of(arguments[0])), new String(System.in.readAllBytes()));
        System.out.println(Base64.getEncoder().encodeToString(dataKey));
    }
}
