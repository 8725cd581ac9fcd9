package traffic

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/stream"
)

const (
	callTimeout = 20 * time.Second
	// flowTimeout bounds the wait for traffic to flow after a stop: a sender
	// whose segments were lost tries again when as much time has passed as
	// since the first loss (RFC 6298, 5.5), whatever arrives from the other end.
	flowTimeout = time.Minute
	// streamRate is in bytes per second, each way.
	streamRate = 2 << 20
	// flow is how many bytes each way prove that the stream is alive.
	flow = 256 << 10
)

// Guest is a Linux guest with VFs and the traffic through its first: a ping and
// a checked stream. Lab, IP and Call are set by who makes it.
type Guest struct {
	// Lab is where the traffic comes from, IP the guest's address.
	Lab *lab.Lab
	IP  netip.Addr
	// Call calls do with a client of the guest where it runs now.
	Call func(ctx context.Context, do func(context.Context, *proto.Client) error) error

	Pinger *Pinger
	Stream *stream.Stream
	// before are the resets and losses of link that the guest had seen when
	// its traffic began.
	before Health
}

// Health is what a guest tells of its driver.
type Health struct {
	// Resets counts messages of the driver about resets, hangs and links.
	Resets uint64
	// Lines are the last of these messages.
	Lines []string
	// CarrierDowns counts losses of links.
	CarrierDowns uint64
	// Stats are the first interface's counters.
	Stats proto.Stats
}

// Health asks the guest.
func (g *Guest) Health(ctx context.Context) (x Health, err error) {
	err = g.Call(ctx, func(ctx context.Context, c *proto.Client) (err error) {
		x, err = Ask(ctx, c)
		return err
	})
	return x, err
}

// Ask asks a guest for its health.
func Ask(ctx context.Context, c *proto.Client) (x Health, err error) {
	r, err := c.Resets(ctx)
	if err != nil {
		return x, err
	}
	x.Resets, x.Lines = r.Count, r.Lines
	info, err := c.Info(ctx)
	if err != nil {
		return x, err
	}
	stats, err := c.Stats(ctx)
	if err != nil {
		return x, err
	}
	if len(info.Interfaces) == 0 || len(stats) != len(info.Interfaces) {
		return x, fmt.Errorf("the guest has %d interfaces, and counters of %d", len(info.Interfaces), len(stats))
	}
	x.Stats = stats[0]
	for _, i := range info.Interfaces {
		if !i.Carrier {
			return x, fmt.Errorf("the guest's interface %s has no link", i.Name)
		}
		x.CarrierDowns += i.CarrierDowns
	}
	return x, nil
}

// Undisturbed fails if the driver was reset or a link went since before.
func (x Health) Undisturbed(before Health) error {
	var errs []error
	if n := x.Resets - before.Resets; n != 0 {
		errs = append(errs, fmt.Errorf("the guest's driver was reset %d times: %q", n, x.Lines))
	}
	if n := x.CarrierDowns - before.CarrierDowns; n != 0 {
		errs = append(errs, fmt.Errorf("the guest's link went down %d times", n))
	}
	return errors.Join(errs...)
}

// Interrupts is how many the first interface has had.
func (x Health) Interrupts() (n uint64) {
	for _, i := range x.Stats.Interrupts {
		n += i
	}
	return n
}

// CheckIntact fails unless the guest's end of its one stream agrees with this one,
// which has ended.
func CheckIntact(ctx context.Context, c *proto.Client, here stream.Stats) error {
	streams, err := c.Streams(ctx)
	if err != nil || len(streams) != 1 {
		return fmt.Errorf("the guest's streams are %+v: %v", streams, err)
	}
	if there := streams[0]; !here.Intact || !there.Intact || here.Sent != there.Received || there.Sent != here.Received {
		return fmt.Errorf("the stream is damaged: here %+v, in the guest %+v", here, there)
	}
	return nil
}

// StartTraffic begins a ping and a checked stream, and waits until both flow.
func (g *Guest) StartTraffic(ctx context.Context) (err error) {
	if g.before, err = g.Health(ctx); err != nil {
		return err
	}
	if g.Pinger, err = Ping(g.Lab, g.IP); err != nil {
		return err
	}
	if g.Stream, err = OpenStream(context.WithoutCancel(ctx), g.Lab, g.IP, uint64(time.Now().UnixNano()), streamRate); err != nil {
		return err
	}
	return g.AwaitFlow(ctx)
}

// Rebase takes what the guest's driver went through up to now for the test's
// own doing: CheckUndisturbed looks at what comes after.
func (g *Guest) Rebase(ctx context.Context) (err error) {
	g.before, err = g.Health(ctx)
	return err
}

// AwaitFlow waits until pings are answered and the stream moves on: the
// guest's VF works in both directions.
func (g *Guest) AwaitFlow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, flowTimeout)
	defer cancel()
	if err := g.Pinger.Await(ctx, 10); err != nil {
		return err
	}
	if err := AwaitProgress(ctx, g.Stream, flow); err != nil {
		return err
	}
	return g.awaitGuestProgress(ctx)
}

// awaitGuestProgress waits until the guest has received more of the stream,
// which is the first that it was asked for.
func (g *Guest) awaitGuestProgress(ctx context.Context) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	var from uint64
	for first := true; ; first = false {
		streams, err := g.guestStreams(ctx)
		if err != nil {
			return fmt.Errorf("waiting for the stream to the guest to move on: %w", err)
		}
		if len(streams) == 0 {
			return errors.New("the guest has no stream")
		}
		if first {
			from = streams[0].Received
		}
		if streams[0].Received >= from+flow {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("timed out waiting for the stream to the guest to move on: %w", context.Cause(ctx))
		}
	}
}

// StopTraffic ends the ping and the stream, and tells whether every byte
// that either end received was the right one.
func (g *Guest) StopTraffic(ctx context.Context) (stream.Stats, error) {
	// The end of a stream comes behind what was lost of it.
	if err := g.AwaitFlow(ctx); err != nil {
		return g.Stream.Stats(), errors.Join(err, g.Pinger.Close())
	}
	stop, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	st, err := g.Stream.Stop(stop)
	if err != nil {
		err = fmt.Errorf("%w; the hub's end: %+v", err, st)
	}
	guest, gerr := g.guestStreams(ctx)
	if err != nil {
		err = fmt.Errorf("%w; the guest's ends: %+v", err, guest)
	}
	return st, errors.Join(err, gerr, g.Pinger.Close())
}

// guestStreams returns the guest's ends of the streams, with an error if one
// of them received a wrong byte.
func (g *Guest) guestStreams(ctx context.Context) (streams []proto.Stream, err error) {
	err = g.Call(ctx, func(ctx context.Context, c *proto.Client) (err error) {
		if streams, err = c.Streams(ctx); err != nil {
			return err
		}
		for _, s := range streams {
			if !s.Intact {
				return fmt.Errorf("the guest received a wrong byte from %s at offset %d", s.Peer, s.FirstBad)
			}
		}
		return nil
	})
	return streams, err
}

// CheckUndisturbed fails if the driver was reset, the link went, or the
// stream broke since the traffic began, or if they do not flow now.
func (g *Guest) CheckUndisturbed(ctx context.Context) (Health, error) {
	if err := g.AwaitFlow(ctx); err != nil {
		return Health{}, err
	}
	now, err := g.Health(ctx)
	if err != nil {
		return now, err
	}
	return now, now.Undisturbed(g.before)
}
