/* Copies the vector registers of the calling thread: 32 of 64 bytes with AVX-512, else 16 of 16 bytes. Returns the number of
 * bytes that were copied, 0 on other processors. */

#if defined(__x86_64__)
#define STORE(instruction, kind, size, n) \
	__asm__ volatile(instruction " %%" kind #n ", %0" : "=m"(*(unsigned char(*)[size])(out + size * n)))
#define ZMM(n) STORE("vmovdqu64", "zmm", 64, n)
#define XMM(n) STORE("movdqu", "xmm", 16, n)
#define SIXTEEN(X) X(0); X(1); X(2); X(3); X(4); X(5); X(6); X(7); X(8); X(9); X(10); X(11); X(12); X(13); X(14); X(15)

__attribute__((target("avx512f"))) static int wide(unsigned char *out)
{
	SIXTEEN(ZMM);
	ZMM(16); ZMM(17); ZMM(18); ZMM(19); ZMM(20); ZMM(21); ZMM(22); ZMM(23);
	ZMM(24); ZMM(25); ZMM(26); ZMM(27); ZMM(28); ZMM(29); ZMM(30); ZMM(31);
	return 2048;
}

static int narrow(unsigned char *out)
{
	SIXTEEN(XMM);
	return 256;
}

int registers(unsigned char *out)
{
	return __builtin_cpu_supports("avx512f") ? wide(out) : narrow(out);
}
#else
int registers(unsigned char *out)
{
	return 0;
}
#endif
