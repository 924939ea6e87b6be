// The first instructions of the program (linker flag -E _envd_entry). Where there is no console the kernel starts process 1
// with descriptors 0 to 2 closed; the Go runtime wants /dev/null for them and, on an empty file system, gives up, which is a
// kernel panic. The root directory is always there: it takes their place until openStandardFiles (pid1.go).

#include "textflag.h"

DATA root<>+0(SB)/8, $0x2f // "/"
GLOBL root<>(SB), RODATA|NOPTR, $8

TEXT _envd_entry(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVL $39, AX // getpid
	SYSCALL
	CMPQ AX, $1
	JNE  start

again:
	MOVL    $257, AX // openat(AT_FDCWD, "/", O_RDONLY)
	MOVQ    $-100, DI
	LEAQ    root<>(SB), SI
	XORL    DX, DX
	XORL    R10, R10
	SYSCALL
	CMPQ    AX, $2
	JLS     again
	MOVQ    AX, DI
	MOVL    $3, AX // close
	SYSCALL
	XORL    DX, DX

start:
	JMP _rt0_amd64_linux(SB)
