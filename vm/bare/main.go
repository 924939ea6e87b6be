// The bare server is what the agent's start is measured against: net/http, and the answer to GET /health.
package main

import (
	"fmt"
	"net/http"
)

func main() {
	http.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintln(w, `{"version":"bare"}`)
	})
	fmt.Println(http.ListenAndServe(":49983", nil))
}
