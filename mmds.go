// The metadata service of Firecracker, version 2 (MMDS): a token first, then the data, both over HTTP at a fixed address.
//
// The host fills it after the guest has started or gone on, so it is asked again and again until it names an instance. Every
// process of the guest can read it, and root there can put anything in its place: answers are bounded in size and time, redirects
// are not followed, no proxy is asked.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
	"unicode"
)

const (
	mmdsURL      = "http://169.254.169.254"
	mmdsLimit    = 64 << 10 // bytes of one answer
	mmdsPatience = 10 * time.Second
	mmdsInterval = 50 * time.Millisecond // at first; after mmdsPatience a tenth of the time waited so far
)

// metadata is what the host says. All but the first may be missing.
type metadata struct {
	InstanceID      string `json:"instanceID"`
	EnvID           string `json:"envID"`
	Address         string `json:"address"`         // of a collector of logs
	AccessTokenHash string `json:"accessTokenHash"` // of the token that /init may set
}

// askOnce makes one request on a connection of its own. The client of net/http would bring TLS into the binary, 400 KB, and proxies
// and redirects, of which there are none between a guest and its host.
func askOnce(ctx context.Context, method, address string, header map[string]string, body []byte) (answer string, err error) {
	ctx, cancel := context.WithTimeout(ctx, mmdsPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	for name, value := range header {
		req.Header[name] = []string{value} // spelled as documented
	}
	req.Close = true
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(req.URL.Hostname(), cmp.Or(req.URL.Port(), "80")))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if err := req.Write(conn); err != nil {
		return "", err
	}
	input := &io.LimitedReader{R: conn, N: mmdsLimit}
	response, err := http.ReadResponse(bufio.NewReader(input), req)
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
	case response.StatusCode != http.StatusOK:
		err = fmt.Errorf("%s %s: %s", method, req.URL.Path, response.Status)
	case input.N == 0:
		err = fmt.Errorf("%s %s: an answer of more than %d bytes", method, req.URL.Path, mmdsLimit)
	}
	return string(text), err
}

// fetchMetadata asks once.
func fetchMetadata(ctx context.Context) (metadata, error) {
	token, err := askOnce(ctx, "PUT", mmdsURL+"/latest/api/token", map[string]string{"X-metadata-token-ttl-seconds": "60"}, nil)
	if err == nil && (token == "" || strings.ContainsFunc(token, unicode.IsControl)) {
		err = errors.New("the token for the metadata is none")
	}
	if err != nil {
		return metadata{}, err
	}
	text, err := askOnce(ctx, "GET", mmdsURL+"/", map[string]string{"X-metadata-token": token, "Accept": "application/json"}, nil)
	if err != nil {
		return metadata{}, err
	}
	var m metadata
	if json.Unmarshal([]byte(text), &m) != nil || strings.ContainsFunc(m.InstanceID+m.EnvID, unicode.IsControl) {
		return metadata{}, errors.New("the metadata are not as they should be")
	}
	return m, nil
}

// pollMetadata asks until an answer names an instance. It gives up with its context only.
func pollMetadata(ctx context.Context) (metadata, error) {
	for began := time.Now(); ; {
		m, err := fetchMetadata(ctx)
		if err == nil && m.InstanceID != "" {
			return m, nil
		}
		interval := mmdsInterval
		if waited := time.Since(began); waited > mmdsPatience {
			interval = min(waited/10, mmdsPatience) // there may be no such service here
		}
		select {
		case <-ctx.Done():
			return m, ctx.Err()
		case <-time.After(interval):
		}
	}
}
