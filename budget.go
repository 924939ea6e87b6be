// The budget: one bound, --memory-limit, on what the daemon holds because a client or a process of the guest makes it hold it.
//
// Whoever is about to hold something for somebody takes its size first and gives it back afterwards: messages, bodies and
// answers, connections and streams, listings and archives, directories under watch and the events kept of them, what List
// tells of a process. Output logs have a fixed part of the limit (outputShare) and keep to it by themselves, since old
// output can be dropped and nothing else can.
//
// Rules. Each class has a share, so that no kind of work keeps all others out. Two shares are apart, nobody else has of them: that of
// strangers, who have not shown the access token yet, and that of processes of which little is known. Of what is left the last
// part is for requests that hold little (grantSmall): whoever asks for much, or has taken many small things, never keeps an
// ordinary start or request from being served. What is not to be had is waited for a moment,
// then refused with an error that names the limit; the OOM killer is never what answers. Of those that want much the oldest
// goes first: many that grow side by side would end up holding everything, and none of them could go on.
//
// Prices are rough and on the safe side: bytes of Go's heap and stacks, not of the kernel.

package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// budgetClass is what a part of the budget is for.
type budgetClass int

const (
	forStrangers budgetClass = iota // requests and connections that have not shown the token
	forRequests                     // messages, connections, streams, answers
	forFiles                        // uploads in memory, listings, archives
	forWatches                      // directories under watch, events that are kept
	forProcesses                    // processes, running and ended, of which List has little to tell
	forConfigs                      // processes of which List has much to tell
	forLinks                        // names of hard links in archives, which can be sent twice as well
	budgetClasses
)

// classShares are the parts, in sixteenths of the budget, that a class may have at most. Together they are more than the
// whole: a class may use what others leave.
var classShares = [budgetClasses]int64{forStrangers: 3, forRequests: 11, forFiles: 10, forWatches: 4, forProcesses: 2, forConfigs: 3, forLinks: 2}

var classNames = [budgetClasses]string{"requests without the token", "requests", "files", "watches", "processes", "large configurations", "links"}

const (
	memoryLimitLeast = 32 << 20         // bytes: bounds of the default, which is an eighth of the memory
	memoryLimitMost  = 512 << 20        //
	grantSmall       = 64 << 10         // bytes: what a grant holds that may use the last eighth
	budgetPatience   = 2 * time.Second  // of take
	oldestPatience   = 3 * time.Second  // and of the oldest of those that want much, besides
	stringSize       = 16               // bytes: of a string, its text besides
	mebibyte         = float64(1 << 20) // for messages
)

// budgetError says what is refused for want of memory. Services answer it with resource_exhausted or 503.
type budgetError struct {
	class         budgetClass
	wanted, limit int64
}

func (e *budgetError) Error() string {
	return fmt.Sprintf("envd has no memory left for this: %s would take %.2f MiB more, of the %.0f that --memory-limit allows",
		classNames[e.class], float64(e.wanted)/mebibyte, float64(e.limit)/mebibyte)
}

// defaultMemoryLimit is for a machine with so many bytes of memory.
func defaultMemoryLimit(machine uint64) int64 {
	return int64(min(max(machine/8, memoryLimitLeast), memoryLimitMost))
}

// outputShare is what of a memory limit all output logs may hold.
func outputShare(memoryLimit int64) int64 { return memoryLimit / 8 * 3 }

// budget is what all grants together may hold. The nil *budget refuses nothing.
type budget struct {
	limit int64 // as it was set, for messages
	size  int64 // bytes for grants: the limit without the part of the output logs

	mu      sync.Mutex // protects what follows, and every grant
	used    int64
	usedFor [budgetClasses]int64
	returns int64         // times that something was given back
	grants  int64         // made so far
	waiting []*grant      // for much
	freed   chan struct{} // closed when something is given back; nil while nobody waits
}

func newBudget(memoryLimit int64) *budget {
	return &budget{limit: memoryLimit, size: memoryLimit - outputShare(memoryLimit)}
}

// grant is what one holder has taken: a request, a connection, a watcher, a process. Its methods may be called by several
// goroutines. The nil *grant stands for a holder that is not counted.
type grant struct {
	budget *budget
	class  budgetClass
	number int64 // the older the smaller
	held   int64
	closed bool // takes nothing any more
}

func (b *budget) grant(class budgetClass) *grant {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.grants++
	return &grant{budget: b, class: class, number: b.grants}
}

// sibling is a grant of the same budget for another class.
func (g *grant) sibling(class budgetClass) *grant {
	if g == nil {
		return nil
	}
	return g.budget.grant(class)
}

// take waits a moment for what is not to be had at once. It fails with a *budgetError, or with the context.
func (g *grant) take(ctx context.Context, bytes int64) error {
	return g.takeWithin(ctx, bytes, budgetPatience)
}

// tryTake fails at once, with a *budgetError.
func (g *grant) tryTake(bytes int64) error { return g.takeWithin(context.Background(), bytes, 0) }

func (g *grant) takeWithin(ctx context.Context, bytes int64, patience time.Duration) error {
	if g == nil || bytes <= 0 {
		return nil
	}
	for began := time.Now(); ; {
		freed, err := g.attempt(bytes, patience > 0)
		if err == nil || freed == nil {
			return err
		}
		left := g.patience(patience) - time.Since(began)
		if left <= 0 {
			g.stopWaiting()
			return err
		}
		select {
		case <-freed:
		case <-ctx.Done():
			g.stopWaiting()
			return ctx.Err()
		case <-time.After(left):
		}
	}
}

// attempt takes if there is room. Otherwise it gives, to who is willing to wait and has a chance, what is closed when room
// may have come.
func (g *grant) attempt(bytes int64, waits bool) (freed <-chan struct{}, err error) {
	b := g.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	fits, much, share := b.fitsLocked(g, g.class, bytes)
	if fits && !(much && b.olderWaitsLocked(g)) {
		g.addLocked(bytes)
		b.forgetLocked(g)
		return nil, nil
	}
	err = &budgetError{g.class, bytes, b.limit}
	if !waits || g.closed || g.held+bytes > share { // for the last nothing that others give back is enough
		return nil, err
	}
	if much && !slices.Contains(b.waiting, g) {
		b.waiting = append(b.waiting, g)
	}
	if b.freed == nil {
		b.freed = make(chan struct{})
	}
	return b.freed, err
}

// fitsLocked tells whether a grant may have so many bytes more in a class, whether that is much, and what it could have at most.
func (b *budget) fitsLocked(g *grant, class budgetClass, bytes int64) (fits, much bool, share int64) {
	part := b.size / 16
	share = part * classShares[class]
	if class == forStrangers || class == forProcesses { // apart
		return b.usedFor[class]+bytes <= share && !g.closed, false, share
	}
	used := b.used - b.usedFor[forStrangers] - b.usedFor[forProcesses]
	most := b.size - part*(classShares[forStrangers]+classShares[forProcesses])
	if much = class != forRequests || g.held+bytes > grantSmall; much {
		most -= part
	}
	share = min(share, most)
	return used+bytes <= most && b.usedFor[class]+bytes <= share && !g.closed, much, share
}

// olderWaitsLocked tells whether a grant that was made before this one, of its class, waits for much.
func (b *budget) olderWaitsLocked(g *grant) bool {
	return slices.ContainsFunc(b.waiting, func(o *grant) bool { return o.number < g.number && o.class == g.class })
}

// patience is how long in all a grant waits. Of those that want much the youngest gives up first, and soon, so that the older
// ones get what it held; the oldest is the most patient.
func (g *grant) patience(most time.Duration) time.Duration {
	b := g.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Contains(b.waiting, g) {
		return most
	}
	var all, younger time.Duration
	for _, o := range b.waiting {
		if o.class == g.class {
			all++
			if o.number > g.number {
				younger++
			}
		}
	}
	if younger+1 == all {
		most += oldestPatience
	}
	return most * (younger + 1) / all
}

// stopWaiting lets younger ones go on.
func (g *grant) stopWaiting() {
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	g.budget.forgetLocked(g)
}

// forgetLocked takes one that waited for much from the list, which may let the next one go on.
func (b *budget) forgetLocked(g *grant) {
	if i := slices.Index(b.waiting, g); i >= 0 {
		b.waiting = slices.Delete(b.waiting, i, i+1)
		b.wakeLocked()
	}
}

func (b *budget) wakeLocked() {
	if b.freed != nil {
		close(b.freed)
		b.freed = nil
	}
}

func (g *grant) addLocked(bytes int64) {
	b := g.budget
	g.held += bytes
	b.used += bytes
	b.usedFor[g.class] += bytes
	if bytes >= 0 {
		return
	}
	b.returns++
	b.wakeLocked()
}

// give returns bytes before the holder ends.
func (g *grant) give(bytes int64) {
	if g == nil {
		return
	}
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	g.addLocked(-min(bytes, g.held))
}

// close gives everything back, for good. It may be called again.
func (g *grant) close() {
	if g == nil {
		return
	}
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	g.closed = true
	g.addLocked(-g.held)
}

// become counts what is held under another class from now on, if there is room for it: a stranger has shown the token.
func (g *grant) become(class budgetClass) bool {
	if g == nil || g.class == class {
		return true
	}
	b := g.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	held := g.held
	g.held = 0 // else it would count twice
	fits, _, _ := b.fitsLocked(g, class, held)
	if g.held = held; fits || g.closed {
		b.usedFor[g.class] -= held
		g.class = class
		b.usedFor[class] += held
		b.wakeLocked()
		return true
	}
	return false
}

// holds is what the grant has, in bytes.
func (g *grant) holds() int64 {
	if g == nil {
		return 0
	}
	g.budget.mu.Lock()
	defer g.budget.mu.Unlock()
	return g.held
}

// inUse is what all grants hold together, in bytes, and how many times something was given back.
func (b *budget) inUse() (bytes, returns int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used, b.returns
}

// byteSize is a flag's number of bytes, which may have a unit: 64MiB.
type byteSize int64

var byteUnits = []string{"", "KiB", "MiB", "GiB"}

func (s *byteSize) String() string {
	for unit := len(byteUnits) - 1; unit > 0; unit-- {
		if size := int64(1) << (10 * unit); int64(*s) >= size && int64(*s)%size == 0 {
			return strconv.FormatInt(int64(*s)/size, 10) + byteUnits[unit]
		}
	}
	return strconv.FormatInt(int64(*s), 10)
}

func (s *byteSize) Set(text string) error {
	digits := strings.TrimRight(text, "KMGiB")
	unit := slices.Index(byteUnits, text[len(digits):])
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || unit < 0 || n < 0 || n > 1<<40>>(10*unit) {
		return fmt.Errorf("%q is no size: a number of bytes, or with a unit KiB, MiB or GiB", text)
	}
	*s = byteSize(n << (10 * unit))
	return nil
}
