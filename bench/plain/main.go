// Command plain is the least that a Go HTTP server can be: what net/http alone costs in size, memory, start and requests.
package main

import (
	"io"
	"log"
	"net"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, "{\"version\":\"0.0.0\"}\n")
	})
	http.HandleFunc("GET /empty", func(http.ResponseWriter, *http.Request) {})
	log.Fatal(http.ListenAndServe(net.JoinHostPort("127.0.0.1", os.Args[1]), nil))
}
