// The child between vfork and exec, for spawn.go. See runSteps there.

#include "go_asm.h"
#include "textflag.h"

#define SYS_exit_group 94

// func vforkSteps(nr, a0, a1, a2 uintptr, steps *step) (ret uintptr)
//
// The child lives in registers: it shares the parent's memory and stack pointer and never touches the stack.
TEXT ·vforkSteps(SB), NOSPLIT|NOFRAME, $0-48
	MOVD	steps+32(FP), R9
	MOVD	a0+8(FP), R0
	MOVD	a1+16(FP), R1
	MOVD	a2+24(FP), R2
	MOVD	nr+0(FP), R8
	SVC
	CBZ	R0, child
	MOVD	R0, ret+40(FP)
	RET

child:
	MOVD	step_nr(R9), R8
	MOVD	step_arg(R9), R0
	MOVD	(step_arg+8)(R9), R1
	MOVD	(step_arg+16)(R9), R2
	MOVD	(step_arg+24)(R9), R3
	SVC
	MOVD	R0, step_result(R9)
	CMN	$4095, R0		// unsigned: above are the errors
	BLO	done
	NEG	R0, R0
	MOVD	step_passes(R9), R11
	LSR	R0, R11, R11		// by the number modulo 64
	TBZ	$0, R11, fail
done:
	MOVD	step_want(R9), R11
	EOR	R11, R0, R0
	MOVD	step_mask(R9), R11
	ANDS	R11, R0, R0
	BNE	fail			// it has not had the effect that it says
	ADD	$step__size, R9
	B	child

fail:
	MOVD	$127, R0
	MOVD	$SYS_exit_group, R8
	SVC
	B	fail
