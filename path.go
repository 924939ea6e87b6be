// Paths as clients name them: which absolute path a request means. Nothing here follows a link or touches a file.

package main

import (
	"errors"
	"path/filepath"
	"strings"
)

var errUserSpecificHome = errors.New("cannot expand user-specific home dir")

// resolvePath turns a client's path into an absolute one. An empty path means the default working directory; `~` the
// home; an absolute path stays exactly as it was sent; a relative one starts at the home and may climb out of it.
func resolvePath(path, home, defaultWorkdir string) (string, error) {
	if path == "" {
		path = defaultWorkdir
	}
	switch {
	case strings.HasPrefix(path, "~"):
		rest := path[1:]
		if rest != "" && rest[0] != '/' && rest[0] != '\\' {
			return "", errUserSpecificHome
		}
		return filepath.Join(home, rest), nil
	case filepath.IsAbs(path):
		return path, nil
	default:
		return filepath.Join("/", home, path), nil
	}
}
