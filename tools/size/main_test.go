package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestSize does what `make size` does: the daemon's own package and those that it brings along are told, with the way to them.
func TestSize(t *testing.T) {
	var out strings.Builder
	if err := run(&out, "../build", 500); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`(?m)^ *\d{7}  the binary as it is shipped$`, `(?m)^ *\d{7}  \.text$`, `(?m)^ *\d{7}  \.gopclntab$`,
		`(?m)^ *\d{6,} +\d+  main .* main\.\S+, \d+$`, `(?m)^ *\d{6,} +\d+  crypto/tls < net/http < .*main `,
		`(?m)^ *\d{6,} +\d+  google\.golang\.org/protobuf/internal/impl < `,
	} {
		if !regexp.MustCompile(want).MatchString(out.String()) {
			t.Errorf("no line matches %s", want)
		}
	}
	if t.Failed() {
		t.Logf("\n%s", &out)
	}
}

func TestPackageOf(t *testing.T) {
	for symbol, want := range map[string]string{
		"main.run": "main", "net/http.(*conn).serve": "net/http", "type:*crypto/tls.Conn": "crypto/tls",
		"slices.SortFunc[go.shape.[]net/http.x]": "slices", "google.golang.org/protobuf/proto.Marshal": "google.golang.org/protobuf/proto",
	} {
		if got := packageOf(symbol); got != want {
			t.Errorf("packageOf(%q) = %q, want %q", symbol, got, want)
		}
	}
}

func TestWay(t *testing.T) {
	from := reachedFrom("_ -> main.main\nmain.main -> net/http.Serve\nnet/http.Serve -> crypto/tls.Read <UsedInIface>\n" +
		"crypto/tls.Read -> crypto/x509.Verify\nmain.main -> crypto/x509.Verify\n")
	if got := way(from, "crypto/x509.Verify"); !slices.Equal(got, []string{"crypto/x509", "crypto/tls", "net/http", "main"}) {
		t.Errorf("the way to crypto/x509 is %q", got)
	}
}
