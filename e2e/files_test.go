// Runs the recipes for files that the README quotes.
package e2e

import (
	"os"
	"os/exec"
	"testing"
)

const filesOutput = `hello, file
file
hello, file
one
raw
two
zipped
"purpose":"example"
"name":"one"
"name":"raw"
"name":"two"
"name":"zipped"
hello, file
hello, file
EVENT_TYPE_CREATE
{}
`

func TestFileRecipes(t *testing.T) {
	t.Parallel()
	needs(t, "sh", "curl", "gzip", "tar", "grep")
	recipe := exec.Command("sh", "examples/files.sh", startDaemon(t, freePort(t)))
	recipe.Env = append(os.Environ(), "NO_PROXY=*")
	recipe.Stderr = os.Stderr
	out, err := recipe.Output()
	if err != nil || string(out) != filesOutput {
		t.Errorf("%v, printed\n%s\nwant\n%s", err, out, filesOutput)
	}
}
