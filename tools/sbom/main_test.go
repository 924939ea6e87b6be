package main

import (
	"bytes"
	"debug/buildinfo"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// TestBill: everything that the binary says it is made of is in the bill, twice the same.
func TestBill(t *testing.T) {
	envd := filepath.Join(t.TempDir(), "envd")
	if out, err := exec.Command("../build", envd).CombinedOutput(); err != nil {
		t.Fatalf("tools/build: %v\n%s", err, out)
	}
	var texts [2]bytes.Buffer
	for i := range texts {
		bom, err := bill(envd)
		if err != nil {
			t.Fatal(err)
		}
		if err := cdx.NewBOMEncoder(&texts[i], cdx.BOMFileFormatJSON).Encode(bom); err != nil {
			t.Fatal(err)
		}
	}
	if texts[0].String() != texts[1].String() {
		t.Errorf("two bills differ:\n%s\n%s", &texts[0], &texts[1])
	}
	var read cdx.BOM
	if err := cdx.NewBOMDecoder(&texts[0], cdx.BOMFileFormatJSON).Decode(&read); err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(envd)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go")}
	for _, dep := range info.Deps {
		want = append(want, "pkg:golang/"+dep.Path+"@"+dep.Version)
	}
	var got []string
	for _, c := range *read.Components {
		got = append(got, c.PackageURL)
	}
	if len(want) < 4 || strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the bill has %q, want %q", got, want)
	}
}

func TestNoBillForOthers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if bom, err := bill(file); err == nil {
		t.Errorf("a script has the bill %v", bom)
	}
}
