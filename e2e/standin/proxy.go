package standin

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"compsc.io/compsc/e2e/lab"
)

// KubeVirt's migration proxy (pkg/virt-handler/migration-proxy): the source's
// libvirt and QEMU connect to unix sockets in their pod; what they send goes
// through TCP from node to node, and there to the sockets of the target's.
const (
	// proxyDir is below /run.
	proxyDir = "kubevirt/migrationproxy"
	// libvirtProxy leads to the target's libvirtd, migrationProxy to its QEMU,
	// which listens at the same path as the source's connects to.
	libvirtProxy, migrationProxy = "libvirt.sock", "migration.sock"
)

func proxyPath(name string) string { return filepath.Join("/var/run", proxyDir, name) }

// proxies are those of one migration.
type proxies struct {
	mu        sync.Mutex
	listeners []net.Listener
	conns     map[net.Conn]struct{}
	closed    bool
	wg        sync.WaitGroup
}

// startProxies makes the way from the source's pod to the target's.
func (s *StandIn) startProxies(source, target *pod, address string) (_ *proxies, err error) {
	x := &proxies{conns: map[net.Conn]struct{}{}}
	defer func() {
		if err != nil {
			x.close()
		}
	}()
	from, to := s.cfg.Lab.Nodes[source.node].NS, s.cfg.Lab.Nodes[target.node].NS
	for name, path := range map[string]string{
		libvirtProxy:   filepath.Join(target.launcher.dir, "libvirt", "libvirt-sock"),
		migrationProxy: filepath.Join(target.launcher.dir, proxyDir, migrationProxy),
	} {
		tcp, err := inNS(to, func() (net.Listener, error) { return net.Listen("tcp", net.JoinHostPort(address, "0")) })
		if err != nil {
			return x, err
		}
		x.serve(tcp, func() (net.Conn, error) { return net.Dial("unix", path) })
		own := filepath.Join(source.launcher.dir, proxyDir, name)
		if err := os.Remove(own); err != nil && !errors.Is(err, os.ErrNotExist) {
			return x, err
		}
		l, err := net.Listen("unix", own)
		if err != nil {
			return x, err
		}
		x.serve(l, func() (net.Conn, error) {
			return inNS(from, func() (net.Conn, error) { return net.Dial("tcp", tcp.Addr().String()) })
		})
	}
	return x, nil
}

func inNS[T any](ns *lab.NS, do func() (T, error)) (out T, err error) {
	err = ns.Do(func() (err error) {
		out, err = do()
		return err
	})
	return out, err
}

func (x *proxies) serve(l net.Listener, dial func() (net.Conn, error)) {
	x.mu.Lock()
	x.listeners = append(x.listeners, l)
	x.mu.Unlock()
	x.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			to, err := dial()
			if err != nil {
				c.Close()
				continue
			}
			x.pipe(c, to)
		}
	})
}

// pipe copies both ways until either end is closed.
func (x *proxies) pipe(a, b net.Conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		a.Close()
		b.Close()
		return
	}
	x.conns[a], x.conns[b] = struct{}{}, struct{}{}
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		x.wg.Go(func() {
			if _, err := io.Copy(way[1], way[0]); err != nil {
				a.Close()
				b.Close()
				return
			}
			// The end of one way is passed on; the other may go on.
			if c, ok := way[1].(interface{ CloseWrite() error }); ok {
				_ = c.CloseWrite()
			}
		})
	}
}

func (x *proxies) close() {
	x.mu.Lock()
	x.closed = true
	for _, l := range x.listeners {
		l.Close()
	}
	for c := range x.conns {
		c.Close()
	}
	x.mu.Unlock()
	x.wg.Wait()
}
