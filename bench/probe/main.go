// Command probe asks for /health every millisecond, one request after the other, and prints how long each took in seconds as
// JSON. A process of its own, so that what it sees is the server and not the scheduler of the program that makes the load.
//
//	probe HOST:PORT DURATION
package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log"
	"net"
	"os"
	"time"
)

const request = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

func main() {
	duration, err := time.ParseDuration(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	var took []float64
	p := prober{address: os.Args[1]}
	for end := time.Now().Add(duration); time.Now().Before(end); time.Sleep(time.Millisecond) {
		start := time.Now()
		if err := p.ask(); err != nil {
			if err = p.ask(); err != nil { // a connection that the server closed meanwhile is opened again, once
				log.Fatal(err)
			}
		}
		took = append(took, time.Since(start).Seconds())
	}
	json.NewEncoder(os.Stdout).Encode(took)
}

type prober struct {
	address string
	conn    net.Conn // nil: there is none
}

// ask sends one request and reads its answer, which is one segment.
func (p *prober) ask() (err error) {
	if p.conn == nil {
		if p.conn, err = net.DialTimeout("tcp", p.address, 10*time.Second); err != nil {
			p.conn = nil
			return err
		}
	}
	p.conn.SetDeadline(time.Now().Add(10 * time.Second))
	answer := make([]byte, 4096)
	_, err = io.WriteString(p.conn, request)
	if err == nil {
		var n int
		n, err = p.conn.Read(answer)
		answer = answer[:n]
	}
	if err == nil && !bytes.HasPrefix(answer, []byte("HTTP/1.1 2")) {
		log.Fatalf("/health: %q", answer)
	}
	if err != nil || bytes.Contains(answer, []byte("Connection: close")) {
		p.conn.Close()
		p.conn = nil
	}
	return err
}
