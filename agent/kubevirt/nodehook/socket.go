package nodehook

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// Listen makes the socket at path, in place of one that an earlier agent left:
// it appears at once in its final form, open to its owner only. The directory is
// made if need be; one that is there, which may be other plugins' too, is left
// as it is. Closing the listener removes the socket, unless a later agent has
// put its own there.
func Listen(path string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil && st.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("hook socket: %s is there and is no socket; remove it", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("hook socket: %w", err)
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".compsc-") // its mode is 0700
	if err != nil {
		return nil, fmt.Errorf("hook socket: %w", err)
	}
	defer os.RemoveAll(dir)
	temporary := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("hook socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(temporary, 0o600); err == nil {
		err = os.Rename(temporary, path)
	}
	var own os.FileInfo
	if err == nil {
		own, err = os.Lstat(path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hook socket: %w", err), l.Close())
	}
	return &listener{UnixListener: l, path: path, own: own}, nil
}

type listener struct {
	*net.UnixListener
	path string
	own  os.FileInfo
	once sync.Once
}

// Close ends the listener. It may be called more than once.
func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if now, serr := os.Lstat(l.path); serr == nil && os.SameFile(now, l.own) {
			err = errors.Join(err, os.Remove(l.path))
		}
	})
	return err
}

// rootOnly are transport credentials of a unix socket that admit processes of
// uid 0, as the kernel tells it (unix(7), SO_PEERCRED). Mode 0600 does not: a
// descriptor may be passed on, and any process with CAP_DAC_OVERRIDE gets in.
type rootOnly struct{}

type peerInfo struct {
	credentials.CommonAuthInfo
}

// AuthType implements credentials.AuthInfo.
func (peerInfo) AuthType() string { return "peercred" }

// ServerHandshake implements credentials.TransportCredentials.
func (rootOnly) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uid, err := peerUID(c)
	if err != nil {
		return nil, nil, err
	}
	if uid != 0 {
		return nil, nil, fmt.Errorf("node hooks: a process of uid %d connected, only uid 0 is served", uid)
	}
	return c, peerInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}

// ClientHandshake implements credentials.TransportCredentials; there is no
// client here.
func (rootOnly) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("node hooks: these credentials are a server's")
}

// Info implements credentials.TransportCredentials.
func (rootOnly) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

// Clone implements credentials.TransportCredentials.
func (r rootOnly) Clone() credentials.TransportCredentials { return r }

// OverrideServerName implements credentials.TransportCredentials.
func (rootOnly) OverrideServerName(string) error { return nil }

func peerUID(c net.Conn) (uint32, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("node hooks: a connection of type %T does not tell its peer", c)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("node hooks: %w", err)
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("node hooks: %w", err)
	}
	if cerr != nil {
		return 0, fmt.Errorf("node hooks: peer of the connection: %w", cerr)
	}
	return cred.Uid, nil
}
