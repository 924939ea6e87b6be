// The first instructions of the program: entry_amd64.s says what for.

#include "textflag.h"

DATA root<>+0(SB)/8, $0x2f // "/"
GLOBL root<>(SB), RODATA|NOPTR, $8

TEXT _envd_entry(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVD $172, R8 // getpid
	SVC
	CMP  $1, R0
	BNE  start

again:
	MOVD $-100, R0 // openat(AT_FDCWD, "/", O_RDONLY)
	MOVD $root<>(SB), R1
	MOVD $0, R2
	MOVD $0, R3
	MOVD $56, R8
	SVC
	CMP  $2, R0
	BLS  again
	MOVD $57, R8 // close
	SVC

start:
	B _rt0_arm64_linux(SB)
