// The child between vfork and exec, for spawn.go. See runSteps there.

#include "go_asm.h"
#include "textflag.h"

#define SYS_exit_group 231
#define EACCES -13
#define ENOENT -2
#define ENOTDIR -20

// func vforkSteps(nr, a0, a1, a2, a3, a4 uintptr, steps *step) (ret uintptr)
//
// The child lives in registers: it shares the parent's memory and stack pointer and never touches the stack.
TEXT ·vforkSteps(SB), NOSPLIT|NOFRAME, $0-64
	MOVQ	steps+48(FP), R12
	MOVQ	a0+8(FP), DI
	MOVQ	a1+16(FP), SI
	MOVQ	a2+24(FP), DX
	MOVQ	a3+32(FP), R10
	MOVQ	a4+40(FP), R8
	MOVQ	nr+0(FP), AX
	SYSCALL
	TESTQ	AX, AX
	JZ	child
	MOVQ	AX, ret+56(FP)
	RET

child:
	XORL	R13, R13		// result of the step before
next:
	MOVQ	step_nr(R12), AX
	CMPQ	AX, $-1			// noMoreSteps
	JEQ	fail
	MOVQ	step_arg(R12), DI
	MOVQ	(step_arg+8)(R12), SI
	MOVQ	(step_arg+16)(R12), DX
	MOVQ	(step_arg+24)(R12), R10
	MOVQ	step_mode(R12), BX
	TESTQ	$const_onLastResult, BX
	JZ	call
	MOVQ	R13, DI
call:
	SYSCALL
	MOVQ	AX, step_result(R12)
	MOVQ	AX, R13
	CMPQ	AX, $-4095		// unsigned: above are the errors
	JCS	done
	TESTQ	$const_mayFail, BX
	JNZ	done
	TESTQ	$const_searches, BX
	JZ	fail
	CMPQ	AX, $ENOENT
	JEQ	done
	CMPQ	AX, $EACCES
	JEQ	done
	CMPQ	AX, $ENOTDIR
	JNE	fail
done:
	ADDQ	$step__size, R12
	JMP	next

fail:
	MOVL	$127, DI
	MOVL	$SYS_exit_group, AX
	SYSCALL
	JMP	fail
