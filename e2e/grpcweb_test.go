// gRPC-Web as a browser speaks it: connect-web's client in node, and in Chromium from an origin that is not the daemon's.
package e2e

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "envd/proto"
)

// importMap tells a browser where the packages are, which have no bundler in between.
const importMap = `<!doctype html><script type="importmap">{"imports": {
  "@connectrpc/connect": "/node_modules/@connectrpc/connect/dist/esm/index.js",
  "@connectrpc/connect/protocol": "/node_modules/@connectrpc/connect/dist/esm/protocol/index.js",
  "@connectrpc/connect/protocol-connect": "/node_modules/@connectrpc/connect/dist/esm/protocol-connect/index.js",
  "@connectrpc/connect/protocol-grpc-web": "/node_modules/@connectrpc/connect/dist/esm/protocol-grpc-web/index.js",
  "@connectrpc/connect-web": "/node_modules/@connectrpc/connect-web/dist/esm/index.js",
  "@bufbuild/protobuf": "/node_modules/@bufbuild/protobuf/dist/esm/index.js",
  "@bufbuild/protobuf/codegenv2": "/node_modules/@bufbuild/protobuf/dist/esm/codegenv2/index.js",
  "@bufbuild/protobuf/reflect": "/node_modules/@bufbuild/protobuf/dist/esm/reflect/index.js",
  "@bufbuild/protobuf/wire": "/node_modules/@bufbuild/protobuf/dist/esm/wire/index.js",
  "@bufbuild/protobuf/wkt": "/node_modules/@bufbuild/protobuf/dist/esm/wkt/index.js"}}</script>`

func TestGRPCWeb(t *testing.T) {
	t.Parallel()
	installJS(t)
	set := &descriptorpb.FileDescriptorSet{}
	for _, file := range []protoreflect.FileDescriptor{timestamppb.File_google_protobuf_timestamp_proto, pb.File_process_proto, pb.File_filesystem_proto} {
		set.File = append(set.File, protodesc.ToFileDescriptorProto(file))
	}
	descriptors, err := proto.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			fmt.Fprint(w, importMap)
			return
		}
		http.FileServer(http.Dir(".")).ServeHTTP(w, r)
	}))
	t.Cleanup(page.Close)
	for _, where := range []string{"node", "Chromium"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			args := []string{"browser/grpcweb_run.mjs", startDaemon(t, freePort(t)), base64.StdEncoding.EncodeToString(descriptors)}
			chromium, err := exec.LookPath("chromium")
			if where == "Chromium" {
				if err != nil {
					t.Skipf("needs chromium: %v", err)
				}
				args = append(args, page.URL)
			}
			client := exec.Command("node", args...)
			client.Env = append(os.Environ(), "CHROMIUM="+chromium, "NO_PROXY=*", "HOME="+t.TempDir())
			client.WaitDelay = time.Second
			defer time.AfterFunc(2*caseTimeout, func() { client.Process.Kill() }).Stop()
			out, err := client.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			t.Logf("%s", out)
		})
	}
}
