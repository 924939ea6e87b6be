// The benchmark measures the real binary from outside; what it needs never shows in the daemon's go.mod.
module envd/bench

go 1.26.0

toolchain go1.26.8

require (
	connectrpc.com/connect v1.21.1
	envd v0.0.0
	golang.org/x/sys v0.49.0
	google.golang.org/protobuf v1.36.12
)

replace envd => ../
