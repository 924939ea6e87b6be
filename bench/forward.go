// The figure of port forwarding: bytes through a forwarded port, against the same listener reached without it. Both ends
// are in this process and on the loopback interface, so that there is nothing but the forwarder between the two columns.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"
)

// forwardAddress stands for the guest's; every Linux machine has it.
const forwardAddress = "127.0.0.2"

func init() {
	figures = append(figures, figure{"forward", []rowSpec{
		{"forwarded port, to the listener", throughput, ratioAtLeast(0.7)},
		{"forwarded port, from the listener", throughput, ratioAtLeast(0.7)},
		{"forwarded port, a byte there and back, p50", seconds, target{}},
	}, measureForward}, figure{"ports", []rowSpec{
		{"port reachable, a process just started", seconds, atMost(0.2)},
		{"port gone", seconds, atMost(1.1)},
	}, measurePorts})
}

// reachable waits until connections to the address succeed, or until they fail, and returns how long that took.
func reachable(d *daemon, address string, want bool) (float64, error) {
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		took := time.Since(start)
		if (err == nil) == want {
			return took.Seconds(), nil
		} else if took > 10*time.Second {
			return 0, fmt.Errorf("the port is reachable: %v, and not %v\n%s", !want, want, d.output.String())
		}
	}
}

// forwardedPort listens on a free port of the loopback interface and says where it is to be reached.
func forwardedPort() (l *net.TCPListener, direct, forwarded string, err error) {
	l, err = net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, "", "", err
	}
	direct = l.Addr().String()
	return l, direct, net.JoinHostPort(forwardAddress, strconv.Itoa(l.Addr().(*net.TCPAddr).Port)), nil
}

func (b *bench) forwarder(ctx context.Context) (*daemon, error) {
	return b.server(ctx, "forwarder "+b.envd, func(ctx context.Context) (*daemon, error) {
		return b.startEnvd(ctx, "--forward-address", forwardAddress)
	})
}

func measurePorts(ctx context.Context, b *bench, add add) error {
	d, err := b.forwarder(ctx)
	if err != nil {
		return err
	}
	c := newClient(d.url, "")
	defer c.close()
	if _, err := c.exec(ctx); err != nil {
		return err
	}
	l, _, forwarded, err := forwardedPort()
	if err != nil {
		return err
	}
	defer l.Close()
	opened, err := reachable(d, forwarded, true)
	if err != nil {
		return err
	}
	l.Close()
	gone, err := reachable(d, forwarded, false)
	add("port reachable, a process just started", opened, none, none)
	add("port gone", gone, none, none)
	return err
}

func measureForward(ctx context.Context, b *bench, add add) error {
	d, err := b.forwarder(ctx)
	if err != nil {
		return err
	}
	l, direct, forwarded, err := forwardedPort()
	if err != nil {
		return err
	}
	defer l.Close()
	if _, err := reachable(d, forwarded, true); err != nil {
		return err
	}
	conn, err := l.Accept() // which that one reached
	if err != nil {
		return err
	}
	conn.Close()

	connect := func(address string) (client, server *net.TCPConn, err error) {
		dialed, err := net.Dial("tcp", address)
		if err != nil {
			return nil, nil, err
		}
		client = dialed.(*net.TCPConn)
		server, err = l.AcceptTCP()
		if err != nil {
			client.Close()
		}
		return client, server, err
	}
	for _, way := range []struct {
		row    string
		toward bool // the listener
	}{{"forwarded port, to the listener", true}, {"forwarded port, from the listener", false}} {
		var took [2]time.Duration
		for i, address := range []string{forwarded, direct} {
			client, server, err := connect(address)
			if err != nil {
				return err
			}
			from, to := server, client
			if way.toward {
				from, to = client, server
			}
			took[i], err = pump(from, to, b.forward)
			client.Close()
			server.Close()
			if err != nil {
				return err
			}
		}
		add(way.row, float64(b.forward)/took[0].Seconds(), float64(b.forward)/took[1].Seconds(), none)
	}

	var there [2][]float64
	for i, address := range []string{forwarded, direct} {
		client, server, err := connect(address)
		if err != nil {
			return err
		}
		go io.Copy(server, server)
		var one [1]byte
		for range b.keys {
			start := time.Now()
			client.Write(one[:])
			if _, err = io.ReadFull(client, one[:]); err != nil {
				break
			}
			there[i] = append(there[i], time.Since(start).Seconds())
		}
		client.Close()
		server.Close()
		if err != nil {
			return err
		}
	}
	add("forwarded port, a byte there and back, p50", percentile(there[0], 50), percentile(there[1], 50), none)
	return ctx.Err()
}

// pump moves n bytes and the end of them.
func pump(from, to *net.TCPConn, n int) (time.Duration, error) {
	sent := make(chan error, 1)
	start := time.Now()
	go func() {
		var err error
		piece := make([]byte, 256<<10)
		for left := n; left > 0 && err == nil; left -= len(piece) {
			_, err = from.Write(piece[:min(left, len(piece))])
		}
		sent <- errors.Join(err, from.CloseWrite())
	}()
	got, err := 0, error(nil)
	for buf := make([]byte, 256<<10); err == nil; {
		var m int
		m, err = to.Read(buf)
		got += m
	}
	if err == io.EOF {
		err = nil
	}
	took := time.Since(start)
	if err = errors.Join(err, <-sent); err == nil && got != n {
		err = fmt.Errorf("%d bytes of %d arrived", got, n)
	}
	return took, err
}
