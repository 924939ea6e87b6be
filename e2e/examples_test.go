// Runs the examples that the README quotes, each against a daemon of its own.
package e2e

import (
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// What each of them prints; curl's sees the status as the daemon words it.
var exampleOutput = regexp.MustCompile(`^hello from Linux\nexit (code|status) 0\n$`)

func runExample(t *testing.T, args []string, env ...string) {
	t.Helper()
	example := exec.Command(args[0], args[1:]...)
	example.Env = append(os.Environ(), append(env, "E2B_SANDBOX_URL=", "NO_PROXY=*")...)
	example.Stderr = os.Stderr
	out, err := example.Output()
	if err != nil || !exampleOutput.Match(out) {
		t.Errorf("%v: %v, printed %q", args, err, out)
	}
}

func TestExamples(t *testing.T) {
	t.Parallel()
	t.Run("run.sh", func(t *testing.T) {
		needs(t, "sh", "curl", "base64")
		runExample(t, []string{"sh", "examples/run.sh", startDaemon(t, freePort(t))})
	})
	t.Run("run.go", func(t *testing.T) {
		runExample(t, []string{"go", "run", "./examples", startDaemon(t, freePort(t))})
	})
	t.Run("run.mjs", func(t *testing.T) {
		installJS(t)
		runExample(t, []string{"node", "examples/run.mjs", startDaemon(t, freePort(t))})
	})
	t.Run("run.py", func(t *testing.T) {
		python := installPython(t)
		runExample(t, []string{python, "examples/run.py", startDaemon(t, freePort(t))})
	})
}

// Debug mode without an address means port 49983 of localhost. That port may be taken here, so daemon and example run
// in a network namespace of their own.
func TestDebugMode(t *testing.T) {
	t.Parallel()
	t.Run("run.mjs", func(t *testing.T) {
		installJS(t)
		inNetworkNamespace(t)
		startDaemon(t, 49983)
		runExample(t, []string{"node", "examples/run.mjs"}, "E2B_DEBUG=true")
	})
	t.Run("run.py", func(t *testing.T) {
		python := installPython(t)
		inNetworkNamespace(t)
		startDaemon(t, 49983)
		runExample(t, []string{python, "examples/run.py"}, "E2B_DEBUG=true")
	})
}

// inNetworkNamespace puts the rest of the test, and what it starts, into a network namespace that has only loopback.
func inNetworkNamespace(t *testing.T) {
	runtime.LockOSThread() // for good: the thread, and the namespace with it, ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("needs root: %v", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		t.Fatal(err)
	}
}
