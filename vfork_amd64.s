// The child between vfork and exec, for spawn.go. See runSteps there.

#include "go_asm.h"
#include "textflag.h"

#define SYS_exit_group 231

// func vforkSteps(nr, a0, a1, a2 uintptr, steps *step) (ret uintptr)
//
// The child lives in registers: it shares the parent's memory and stack pointer and never touches the stack.
TEXT ·vforkSteps(SB), NOSPLIT|NOFRAME, $0-48
	MOVQ	steps+32(FP), R12
	MOVQ	a0+8(FP), DI
	MOVQ	a1+16(FP), SI
	MOVQ	a2+24(FP), DX
	MOVQ	nr+0(FP), AX
	SYSCALL
	TESTQ	AX, AX
	JZ	child
	MOVQ	AX, ret+40(FP)
	RET

child:
	MOVQ	step_nr(R12), AX
	MOVQ	step_arg(R12), DI
	MOVQ	(step_arg+8)(R12), SI
	MOVQ	(step_arg+16)(R12), DX
	MOVQ	(step_arg+24)(R12), R10
	SYSCALL
	MOVQ	AX, step_result(R12)
	CMPQ	AX, $-4095		// unsigned: above are the errors
	JCS	done
	NEGQ	AX
	MOVQ	step_passes(R12), BX
	BTQ	AX, BX			// by the number modulo 64
	JCC	fail
done:
	XORQ	step_want(R12), AX
	ANDQ	step_mask(R12), AX
	JNZ	fail			// it has not had the effect that it says
	ADDQ	$step__size, R12
	JMP	child

fail:
	MOVL	$127, DI
	MOVL	$SYS_exit_group, AX
	SYSCALL
	JMP	fail
