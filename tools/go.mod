// The tools behind the Makefile, pinned here; they never show in the daemon's go.mod.
module envd/tools

go 1.26.0

toolchain go1.26.8

// Ours: `go tool protogen` and so on. They are described in their main.go.
tool (
	envd/tools/protogen
	envd/tools/run
	envd/tools/testreport
)

// The generators of proto/*.go, and the linter of `make check`.
tool (
	connectrpc.com/connect/cmd/protoc-gen-connect-go
	google.golang.org/protobuf/cmd/protoc-gen-go
	honnef.co/go/tools/cmd/staticcheck
)

require (
	connectrpc.com/connect v1.21.1
	envd v0.0.0
	github.com/bufbuild/protocompile v0.14.1
	google.golang.org/protobuf v1.36.12
)

replace envd => ../

require (
	github.com/BurntSushi/toml v1.4.1-0.20240526193622-a339e1f7089c // indirect
	golang.org/x/exp/typeparams v0.0.0-20231108232855-2478ac86f678 // indirect
	golang.org/x/mod v0.41.0 // indirect
	golang.org/x/sync v0.23.0 // indirect
	golang.org/x/tools v0.51.0 // indirect
	honnef.co/go/tools v0.8.2 // indirect
)
