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

// SendMulticast sends datagrams to the group that guests listen to, one each
// interval, until stop is called, which must be once and tells how many were
// sent.
func SendMulticast(l *lab.Lab, interval time.Duration) (stop func() (int, error), err error) {
	var conn net.PacketConn
	var hub *net.Interface
	if err := l.Hub.Do(func() (err error) {
		if hub, err = net.InterfaceByName(lab.NodeBridge); err != nil {
			return err
		}
		conn, err = net.ListenPacket("udp4", net.JoinHostPort(l.HubIP().String(), "0"))
		return err
	}); err != nil {
		return nil, fmt.Errorf("multicast: %w", err)
	}
	p := ipv4.NewPacketConn(conn)
	if err := p.SetMulticastInterface(hub); err != nil {
		conn.Close()
		return nil, fmt.Errorf("multicast: %w", err)
	}
	to := &net.UDPAddr{IP: net.ParseIP(proto.MulticastGroup), Port: proto.MulticastPort}
	type result struct {
		n   int
		err error
	}
	ended, end := make(chan result, 1), make(chan struct{})
	go func() {
		defer conn.Close()
		t := time.NewTicker(interval)
		defer t.Stop()
		for i := 0; ; i++ {
			if _, err := conn.WriteTo(fmt.Appendf(nil, "%d", i), to); err != nil {
				ended <- result{i, fmt.Errorf("multicast: %w", err)}
				return
			}
			select {
			case <-t.C:
			case <-end:
				ended <- result{i + 1, nil}
				return
			}
		}
	}()
	return func() (int, error) {
		close(end)
		r := <-ended
		return r.n, r.err
	}, nil
}
