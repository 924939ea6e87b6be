// The budget by itself: shares, the reserve for small grants, waiting, and that nothing is lost on the way.

package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestBudgetShares(t *testing.T) {
	b := newBudget(64 << 20)
	large := b.grant(forFiles)
	for large.tryTake(1<<20) == nil {
	}
	if got, most := large.holds(), b.size*10/16; got > most || got < most-1<<20 {
		t.Fatalf("a large grant got %d bytes of %d, want up to 10/16", got, b.size)
	}
	if err := b.grant(forRequests).tryTake(grantSmall); err != nil {
		t.Fatalf("a small request was refused beside a large one: %v", err)
	}
	var refusal *budgetError
	if err := b.grant(forRequests).tryTake(1 << 20); !errors.As(err, &refusal) {
		t.Fatalf("more than a small request beside a large one: %v", err)
	}
	large.close()
	// Of small things as many as there may be.
	for b.grant(forWatches).tryTake(32<<10) == nil || b.grant(forProcesses).tryTake(32<<10) == nil {
	}
	for b.grant(forRequests).tryTake(32<<10) == nil {
	}
	if err := b.grant(forStrangers).tryTake(48 << 10); err != nil {
		t.Fatalf("a stranger was refused beside many small things: %v", err)
	}
	b = newBudget(64 << 20)
	strangers := b.grant(forStrangers)
	for strangers.tryTake(32<<10) == nil {
	}
	if got, share := strangers.holds(), b.size/16*3; got > share || got < share-64<<10 {
		t.Fatalf("strangers got %d bytes of %d, want three sixteenths", got, b.size)
	}
	strangers.become(forRequests)
	if err := b.grant(forStrangers).tryTake(1 << 20); err != nil {
		t.Fatalf("who has shown the token is a stranger still: %v", err)
	}
}

func TestBudgetWaits(t *testing.T) {
	b := newBudget(64 << 20)
	first, second := b.grant(forFiles), b.grant(forFiles)
	if err := first.take(t.Context(), 20<<20); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, first.close)
	if err := second.take(t.Context(), 20<<20); err != nil {
		t.Fatalf("what was given back meanwhile was not had: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if err := b.grant(forFiles).take(ctx, 20<<20); !errors.Is(err, context.Canceled) {
		t.Fatalf("who has left waits on: %v", err)
	}
	began := time.Now()
	if err := b.grant(forFiles).take(t.Context(), 1<<30); err == nil || time.Since(began) > budgetPatience/2 {
		t.Fatalf("what can never be had was waited for, or given: %v after %v", err, time.Since(began))
	}
	if first.tryTake(1) == nil {
		t.Fatal("a closed grant takes")
	}
}

// TestBudgetOldestFirst: many that grow side by side do not keep one another from going on.
func TestBudgetOldestFirst(t *testing.T) {
	b := newBudget(64 << 20)
	var done, refused atomic.Int64
	var all sync.WaitGroup
	for range 16 {
		g := b.grant(forFiles)
		all.Go(func() {
			defer g.close()
			for range 10 { // 10 MiB in all; three fit at once
				if g.take(t.Context(), 1<<20) != nil {
					refused.Add(1)
					return
				}
				time.Sleep(time.Millisecond)
			}
			done.Add(1)
		})
	}
	all.Wait()
	t.Logf("%d done, %d refused", done.Load(), refused.Load())
	if done.Load() == 0 || done.Load()+refused.Load() != 16 {
		t.Errorf("%d of 16 came to their end, %d were refused", done.Load(), refused.Load())
	}
}

// TestBudgetBalance: whatever is taken and given by many at once, nothing is left in the end and the bound holds throughout.
func TestBudgetBalance(t *testing.T) {
	b := newBudget(8 << 20)
	var all sync.WaitGroup
	for seed := range uint64(8) {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, 0))
			for range 2000 {
				g := b.grant(budgetClass(random.IntN(int(budgetClasses))))
				for range random.IntN(5) {
					g.tryTake(random.Int64N(1 << 20))
					g.give(random.Int64N(1 << 19))
					if used, _ := b.inUse(); used > b.size {
						t.Error("more is in use than the budget has")
					}
				}
				g.become(forRequests)
				g.close()
			}
		})
	}
	all.Wait()
	if b.used != 0 || b.usedFor != [budgetClasses]int64{} {
		t.Fatalf("left in use: %d, %v", b.used, b.usedFor)
	}
}

func TestByteSize(t *testing.T) {
	for text, want := range map[string]byteSize{"0": 0, "1": 1, "64MiB": 64 << 20, "3GiB": 3 << 30, "5KiB": 5 << 10} {
		var got byteSize
		if err := got.Set(text); err != nil || got != want || got.String() != text {
			t.Errorf("%s: %d, %s, %v", text, got, got.String(), err)
		}
	}
	for _, text := range []string{"", "MiB", "-1", "1MB", "1MiBKiB", "1.5GiB", "9999999999GiB", "1B"} {
		if new(byteSize).Set(text) == nil {
			t.Errorf("%q was taken for a size", text)
		}
	}
}
