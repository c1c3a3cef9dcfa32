// BouncyCastle's SM2Engine in each of its modes, for tests/test_sm2_forms.py.
//
//     java -cp bcprov.jar:. Sm2Modes D X Y < lines
//
// D, X and Y are a key pair in hex. Each line is MODE encrypt|decrypt HEX, where MODE is default, C1C2C3 or C1C3C2; the output has
// a line in hex for each.

import java.math.BigInteger;
import java.security.SecureRandom;
import java.util.Scanner;
import org.bouncycastle.asn1.gm.GMNamedCurves;
import org.bouncycastle.crypto.engines.SM2Engine;
import org.bouncycastle.crypto.params.ECDomainParameters;
import org.bouncycastle.crypto.params.ECPrivateKeyParameters;
import org.bouncycastle.crypto.params.ECPublicKeyParameters;
import org.bouncycastle.crypto.params.ParametersWithRandom;
import org.bouncycastle.util.encoders.Hex;

public class Sm2Modes {
    public static void main(String[] arguments) throws Exception {
        var curve = new ECDomainParameters(GMNamedCurves.getByName("sm2p256v1"));
        var privateKey = new ECPrivateKeyParameters(new BigInteger(arguments[0], 16), curve);
        var point = curve.getCurve().createPoint(new BigInteger(arguments[1], 16), new BigInteger(arguments[2], 16));
        var publicKey = new ParametersWithRandom(new ECPublicKeyParameters(point, curve), new SecureRandom());
        var lines = new Scanner(System.in);
        while (lines.hasNext()) {
            var mode = lines.next();
            var engine = mode.equals("default") ? new SM2Engine() : new SM2Engine(SM2Engine.Mode.valueOf(mode));
            var encrypt = lines.next().equals("encrypt");
            engine.init(encrypt, encrypt ? publicKey : privateKey);
            var data = Hex.decode(lines.next());
            System.out.println(Hex.toHexString(engine.processBlock(data, 0, data.length)));
        }
    }
}
