package traffic

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/net/ipv4"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/stream"
)

// dialTimeout bounds the connection of a stream.
const dialTimeout = 10 * time.Second

// OpenStream starts a checked stream in both directions between the hub and
// the guest, at rate bytes per second each. It lives until it is stopped or
// ctx ends.
func OpenStream(ctx context.Context, l *lab.Lab, guest netip.Addr, seed, rate uint64) (*stream.Stream, error) {
	var conn net.Conn
	if err := l.Hub.Do(func() (err error) {
		d := net.Dialer{Timeout: dialTimeout}
		conn, err = d.DialContext(ctx, "tcp4", net.JoinHostPort(guest.String(), strconv.Itoa(stream.Port)))
		return err
	}); err != nil {
		return nil, fmt.Errorf("stream: %w", err)
	}
	return stream.Run(ctx, conn, seed, rate), nil
}

// AwaitProgress waits until n more bytes have come through the stream.
func AwaitProgress(ctx context.Context, s *stream.Stream, n uint64) error {
	want := s.Stats().Received + n
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		st := s.Stats()
		if !st.Intact || st.Error != "" {
			return fmt.Errorf("the stream broke: %+v", st)
		}
		if st.Received >= want {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("the stream stalls: %+v: %w", st, ctx.Err())
		}
	}
}

// SendMulticast sends n datagrams to the group that guests listen to, spread
// over d, and returns when the last one is sent.
func SendMulticast(ctx context.Context, l *lab.Lab, n int, d time.Duration) error {
	var conn net.PacketConn
	var hub *net.Interface
	if err := l.Hub.Do(func() (err error) {
		if hub, err = net.InterfaceByName(lab.NodeBridge); err != nil {
			return err
		}
		conn, err = net.ListenPacket("udp4", net.JoinHostPort(l.HubIP().String(), "0"))
		return err
	}); err != nil {
		return fmt.Errorf("multicast: %w", err)
	}
	defer conn.Close()
	p := ipv4.NewPacketConn(conn)
	if err := p.SetMulticastInterface(hub); err != nil {
		return fmt.Errorf("multicast: %w", err)
	}
	to := &net.UDPAddr{IP: net.ParseIP(proto.MulticastGroup), Port: proto.MulticastPort}
	t := time.NewTicker(max(d/time.Duration(n), time.Microsecond))
	defer t.Stop()
	for i := range n {
		if _, err := conn.WriteTo(fmt.Appendf(nil, "%d", i), to); err != nil {
			return fmt.Errorf("multicast: %w", err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
