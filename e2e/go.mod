module envd/e2e

go 1.26.0

toolchain go1.26.8

require (
	connectrpc.com/connect v1.21.1
	envd v0.0.0
	golang.org/x/sys v0.49.0
)

require google.golang.org/protobuf v1.36.12 // indirect

replace envd => ../
