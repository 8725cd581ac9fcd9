//go:build e2edrivers

package drivers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/stream"
	"compsc.io/compsc/e2e/wait"
)

const (
	// extraRate is that of each further stream, in bytes per second each way.
	extraRate = 512 << 10
	// rounds in which frames that must not arrive are sent.
	rounds = 2
	// pingHeaders are IP's and ICMP's.
	pingHeaders = 28
	// flows are from so many ports: that all of them go to one queue of two
	// is as likely as 24 throws of a coin with one result.
	flows = 24
)

// verify fails unless everything that the guest asked for is in force, as
// seen by traffic.
func (r *rig) verify(ctx context.Context) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	check(r.t, r.flow(ctx))
	for _, verify := range []func(context.Context) error{r.verifyQueues, r.verifyFrames, r.verifyPing, r.verifySums, r.verifyModeration} {
		if err := verify(ctx); err != nil {
			now, herr := r.vm.Health(r.ctx)
			r.t.Fatalf("%v\nthe guest: %+v %v", err, now, herr)
		}
	}
	s := r.settings(ctx)
	if s.RX != r.want.rx || s.TX != r.want.tx || s.Usecs != r.want.usecs {
		r.t.Fatalf("rings of %d and %d, rx-usecs %d, want %d, %d and %d", s.RX, s.TX, s.Usecs, r.want.rx, r.want.tx, r.want.usecs)
	}
	features := map[string]bool{}
	for f := range r.want.features {
		features[f] = s.Features[f]
	}
	if diff := cmp.Diff(r.want.features, features); diff != "" {
		r.t.Fatalf("features (-want +got):\n%s", diff)
	}
}

// verifyFrames sends frames of all kinds and fails unless exactly those
// arrive that the guest is to receive. What must not arrive is sent several
// times, each time before a frame that is seen to arrive.
func (r *rig) verifyFrames(ctx context.Context) error {
	probes := r.want.probes(r.token)
	r.token += uint64(len(probes))
	var missing []string
	for round := 0; round < rounds || len(missing) > 0; round++ {
		for _, p := range probes {
			if err := r.trunk.send(p.frame); err != nil {
				return err
			}
		}
		seen, err := r.sentinel(ctx)
		if err != nil {
			return errors.Join(err, fmt.Errorf("frames that did not arrive: %q", missing))
		}
		missing = nil
		for _, p := range probes {
			switch n := seen[p.token]; {
			case n > 0 && !p.want:
				return fmt.Errorf("a frame to %s arrived, which the guest is not to receive", p.what)
			case n == 0 && p.want:
				missing = append(missing, p.what)
			}
		}
	}
	return nil
}

// sentinel sends a frame to the guest until it arrives.
func (r *rig) sentinel(ctx context.Context) (seen map[uint64]uint64, err error) {
	token := r.token
	r.token++
	err = wait.Until(ctx, "a frame to arrive", func(ctx context.Context) (bool, error) {
		if err := r.trunk.send(newFrame(guestMAC, token)); err != nil {
			return false, err
		}
		err := r.vm.Call(ctx, func(ctx context.Context, c *proto.Client) (err error) {
			seen, err = c.Frames(ctx)
			return err
		})
		return seen[token] > 0, err
	})
	return seen, err
}

// verifyPing waits for the answer to a ping that fills a packet.
func (r *rig) verifyPing(ctx context.Context) error {
	return bigPing(ctx, r.h.Lab, r.want.mtu-pingHeaders)
}

// verifySums fails if the hub dropped a segment for a wrong checksum: TCP
// sends it again, in another way, and the streams would go on.
func (r *rig) verifySums(context.Context) error {
	var table []byte
	if err := r.h.Lab.Hub.Do(func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/snmp")
		return err
	}); err != nil {
		return err
	}
	// A line of names and one of numbers for each protocol.
	var names []string
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if fields[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		if i := slices.Index(names, "InCsumErrors"); i >= 0 && i < len(fields) {
			if fields[i] != "0" {
				return fmt.Errorf("%s of the guest's TCP segments had a wrong checksum", fields[i])
			}
			return nil
		}
	}
	return errors.New("the kernel does not count segments with a wrong checksum")
}

// verifyModeration fails unless the VF has the interval that the guest set, in
// each vector of its queues (ixgbevf_write_eitr). A guest that set none changes
// it all the time.
func (r *rig) verifyModeration(ctx context.Context) error {
	if r.want.usecs == adaptiveUsecs {
		return nil
	}
	for vector := range int(r.cores) {
		got, err := r.register(ctx, ixgbevf.VTEITR(vector))
		if err != nil {
			return err
		}
		if want := uint32(r.want.usecs) << 2 & ixgbevf.EITRInterval; got != want {
			return fmt.Errorf("VTEITR(%d) of the VF is %#x, the guest set %#x, %d microseconds", vector, got, want, r.want.usecs)
		}
	}
	return nil
}

// adaptiveUsecs is what rx-usecs is when the driver chooses the interval.
const adaptiveUsecs = 1

// register reads a register of the VF as the guest would.
func (r *rig) register(ctx context.Context, offset uint32) (uint32, error) {
	return r.h.StandIn.Register(ctx, client.ObjectKey{Namespace: harness.Namespace, Name: harness.VMI}, ixgbevf.VendorID, ixgbevf.DeviceID, offset)
}

// bigPing waits until an echo request with so much payload is answered. No
// wire on its way fragments it.
func bigPing(ctx context.Context, l *lab.Lab, size int) error {
	var conn *icmp.PacketConn
	if err := l.Hub.Do(func() (err error) {
		conn, err = icmp.ListenPacket("ip4:icmp", l.HubIP().String())
		return err
	}); err != nil {
		return fmt.Errorf("ping: %w", err)
	}
	defer conn.Close()
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	// The pinger of the traffic has the process's number.
	id := os.Getpid()&0xffff ^ 0x8000
	request, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Data: data}}).Marshal(nil)
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	return wait.Until(ctx, fmt.Sprintf("a ping with %d bytes to be answered", size), func(context.Context) (bool, error) {
		if _, err := conn.WriteTo(request, &net.IPAddr{IP: l.GuestIP().Addr().AsSlice()}); err != nil {
			return false, err
		}
		if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return false, err
		}
		for {
			n, _, err := conn.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return false, nil
			}
			if err != nil {
				return false, err
			}
			m, err := icmp.ParseMessage(1, buf[:n])
			if err != nil || m.Type != ipv4.ICMPTypeEchoReply {
				continue
			}
			if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id {
				if !bytes.Equal(e.Data, data) {
					return false, errors.New("the answer has other data")
				}
				return true, nil
			}
		}
	})
}

// verifyQueues fails unless the guest has a queue pair for each CPU, and all
// of its receive queues get what RSS gives them.
func (r *rig) verifyQueues(ctx context.Context) error {
	before, err := r.vm.Health(ctx)
	if err != nil {
		return err
	}
	var queues []string
	for name := range before.Stats.Driver {
		if strings.HasPrefix(name, "rx_queue_") && strings.HasSuffix(name, "_packets") {
			queues = append(queues, name)
		}
	}
	if len(queues) != int(r.cores) {
		return fmt.Errorf("the guest has receive queues %q, want %d", queues, r.cores)
	}
	return wait.Until(ctx, fmt.Sprintf("packets in each of %q", queues), func(ctx context.Context) (bool, error) {
		if err := spread(r.h.Lab); err != nil {
			return false, err
		}
		now, err := r.vm.Health(ctx)
		for _, q := range queues {
			if now.Stats.Driver[q] <= before.Stats.Driver[q] {
				return false, err
			}
		}
		return true, err
	})
}

// spread sends a TCP segment to a closed port from each of many ports: UDP has
// no part in the hash of an 82599's VF.
func spread(l *lab.Lab) error {
	return l.Hub.Do(func() error {
		for range flows {
			c, err := net.DialTimeout("tcp4", net.JoinHostPort(l.GuestIP().Addr().String(), "9"), time.Second)
			if err == nil {
				_ = c.Close()
				return errors.New("the guest has an open port 9")
			}
			if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
		}
		return nil
	})
}

// openStream starts a checked stream from the hub, and returns the address
// under which the guest knows it. Its segments fill packets of mtu bytes.
func openStream(ctx context.Context, l *lab.Lab, to netip.Addr, mtu int) (*stream.Stream, string, error) {
	var conn net.Conn
	if err := l.Hub.Do(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second}
		conn, err = d.DialContext(ctx, "tcp4", net.JoinHostPort(to.String(), strconv.Itoa(stream.Port)))
		return err
	}); err != nil {
		return nil, "", fmt.Errorf("stream: %w", err)
	}
	if mss, err := maxSegment(conn.(*net.TCPConn)); err != nil || mss < mtu-maxTCPHeaders || mss > mtu {
		conn.Close()
		return nil, "", fmt.Errorf("stream: segments of %d bytes, with an MTU of %d: %w", mss, mtu, err)
	}
	return stream.Run(context.WithoutCancel(ctx), conn, rand.Uint64(), extraRate), conn.LocalAddr().String(), nil
}

// maxTCPHeaders are IP's and TCP's with its time stamps.
const maxTCPHeaders = 52

// maxSegment is the connection's maximum segment size.
func maxSegment(conn *net.TCPConn) (mss int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) { mss, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
	return mss, errors.Join(cerr, err)
}
