// The child between vfork and exec, for spawn.go. See runSteps there.

#include "go_asm.h"
#include "textflag.h"

#define SYS_exit_group 94
#define EACCES -13
#define ENOENT -2
#define ENOTDIR -20

// func vforkSteps(nr, a0, a1, a2, a3, a4 uintptr, steps *step) (ret uintptr)
//
// The child lives in registers: it shares the parent's memory and stack pointer and never touches the stack.
TEXT ·vforkSteps(SB), NOSPLIT|NOFRAME, $0-64
	MOVD	steps+48(FP), R9
	MOVD	a0+8(FP), R0
	MOVD	a1+16(FP), R1
	MOVD	a2+24(FP), R2
	MOVD	a3+32(FP), R3
	MOVD	a4+40(FP), R4
	MOVD	nr+0(FP), R8
	SVC
	CBZ	R0, child
	MOVD	R0, ret+56(FP)
	RET

child:
	MOVD	ZR, R10			// result of the step before
next:
	MOVD	step_nr(R9), R8
	CMN	$1, R8			// noMoreSteps
	BEQ	fail
	MOVD	step_arg(R9), R0
	MOVD	(step_arg+8)(R9), R1
	MOVD	(step_arg+16)(R9), R2
	MOVD	(step_arg+24)(R9), R3
	MOVD	step_mode(R9), R11
	TBZ	$const_onLastResultBit, R11, call
	MOVD	R10, R0
call:
	SVC
	MOVD	R0, step_result(R9)
	MOVD	R0, R10
	CMN	$4095, R0		// unsigned: above are the errors
	BLO	done
	TBNZ	$const_mayFailBit, R11, done
	TBZ	$const_searchesBit, R11, fail
	CMN	$(-ENOENT), R0
	BEQ	done
	CMN	$(-EACCES), R0
	BEQ	done
	CMN	$(-ENOTDIR), R0
	BNE	fail
done:
	ADD	$step__size, R9
	B	next

fail:
	MOVD	$127, R0
	MOVD	$SYS_exit_group, R8
	SVC
	B	fail
