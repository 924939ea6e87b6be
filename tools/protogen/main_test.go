package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

const protoDir = "../../proto"

// TestUpToDate fails when `make proto` would change anything: because a .proto file, a generator or a generated file is
// another one.
func TestUpToDate(t *testing.T) {
	files, err := generate(protoDir)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := filepath.Glob(filepath.Join(protoDir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range committed {
		name := filepath.Base(path)
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if generated, ok := files[name]; !ok {
			t.Errorf("proto/%s: no .proto file makes it", name)
		} else if !bytes.Equal(content, generated) {
			t.Errorf("proto/%s is not what the generators make of its .proto file: run make proto", name)
		}
		delete(files, name)
	}
	for name := range files {
		t.Errorf("proto/%s is missing: run make proto", name)
	}
}

func TestGenerate(t *testing.T) {
	write := func(source string) string {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "a.proto"), []byte(source), 0o644); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	const head = "syntax = \"proto3\";\npackage a;\noption go_package = \"envd/proto;pb\";\n"
	files, err := generate(write(head + "// Kept.\nmessage M {}\nservice S { rpc R(M) returns (M); }\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 2 || files["a.connect.go"] == nil {
		t.Errorf("generated %d files, want a.pb.go and a.connect.go", len(files))
	}
	if !bytes.Contains(files["a.pb.go"], []byte("// Kept.\ntype M struct")) {
		t.Error("the comment of a message is not in a.pb.go")
	}
	if _, err := generate(write(head + "message M { string s = 1; string t = 1; }\n")); err == nil {
		t.Error("two fields of one number: no error")
	}
	if _, err := generate(t.TempDir()); err == nil {
		t.Error("a directory without a .proto file: no error")
	}
}

func TestImportsComeFirst(t *testing.T) {
	request, err := parse(protoDir)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, f := range request.ProtoFile {
		order = append(order, f.GetName())
	}
	timestamp, process := slices.Index(order, "google/protobuf/timestamp.proto"), slices.Index(order, "process.proto")
	if timestamp < 0 || process < timestamp {
		t.Errorf("order %q: want timestamp.proto before process.proto", order)
	}
}
