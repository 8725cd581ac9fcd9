package device

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

// TestSocketServesAsSoonAsItIsThere has a client connect the moment it sees the
// socket, over and over, as it is about a moment.
func TestSocketServesAsSoonAsItIsThere(t *testing.T) {
	for range 500 {
		dir := t.TempDir()
		path := filepath.Join(dir, ControlSocket)
		dialed := make(chan error, 1)
		go func() {
			for {
				if _, err := os.Lstat(path); err == nil {
					break
				}
			}
			c, err := net.Dial("unix", path)
			if err == nil {
				err = c.Close()
			}
			dialed <- err
		}()
		l, err := listen(dir, ControlSocket)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-dialed; err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Fatalf("the socket has mode %v: %v", st, err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
