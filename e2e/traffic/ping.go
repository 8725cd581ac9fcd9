// Package traffic loads a guest's VF from the hub of a lab and tells what got
// lost: a fast ping, a checked TCP stream, and counted multicast datagrams.
package traffic

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"compsc.io/compsc/e2e/lab"
)

const (
	// PingInterval is the usual time between two echo requests.
	PingInterval = 10 * time.Millisecond
	// pingTimeout is how long to wait for the answer that tells which earlier
	// requests were lost. It is no measure of lateness: a VM that stands still,
	// or gets no processor, answers late when nothing was lost.
	pingTimeout = 10 * time.Second
	// pingPayload holds the sequence number, which is longer than ICMP's.
	pingPayload = 56
)

// Pinger pings a guest until Close. Its methods are safe for concurrent use.
type Pinger struct {
	conn     *icmp.PacketConn
	to       net.Addr
	id       int
	interval time.Duration

	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu   sync.Mutex
	sent []time.Time     // by sequence number
	rtt  []time.Duration // 0: no reply yet
	// answered is one more than the highest number of a request that was
	// answered. Requests and answers keep their order, so that what is below it
	// and has no answer is lost.
	answered int
}

// Ping starts a pinger in the hub.
func Ping(l *lab.Lab, to netip.Addr) (*Pinger, error) { return PingEvery(l, to, PingInterval) }

// PingEvery is Ping with another time between two requests, for a guest that
// cannot answer so many.
func PingEvery(l *lab.Lab, to netip.Addr, interval time.Duration) (*Pinger, error) {
	p := &Pinger{interval: interval, to: &net.IPAddr{IP: to.AsSlice()}, id: os.Getpid() & 0xffff}
	if err := l.Hub.Do(func() (err error) {
		p.conn, err = icmp.ListenPacket("ip4:icmp", l.HubIP().String())
		return err
	}); err != nil {
		return nil, fmt.Errorf("ping: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	p.wg.Go(func() { p.send(ctx) })
	p.wg.Go(p.receive)
	return p, nil
}

// Close ends the pinger.
func (p *Pinger) Close() error {
	p.cancel()
	err := p.conn.Close()
	p.wg.Wait()
	return err
}

func (p *Pinger) send(ctx context.Context) {
	t := time.NewTicker(p.interval)
	defer t.Stop()
	for {
		p.mu.Lock()
		seq := len(p.sent)
		p.sent = append(p.sent, time.Now())
		p.rtt = append(p.rtt, 0)
		p.mu.Unlock()
		payload := make([]byte, pingPayload)
		binary.BigEndian.PutUint64(payload, uint64(seq))
		m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: p.id, Seq: seq & 0xffff, Data: payload}}
		if b, err := m.Marshal(nil); err == nil {
			// A request that could not be sent is a lost one.
			_, _ = p.conn.WriteTo(b, p.to)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

func (p *Pinger) receive() {
	b := make([]byte, 1500)
	for {
		n, from, err := p.conn.ReadFrom(b)
		if err != nil {
			return // closed
		}
		if from.String() != p.to.String() {
			continue
		}
		m, err := icmp.ParseMessage(1, b[:n])
		if err != nil || m.Type != ipv4.ICMPTypeEchoReply {
			continue
		}
		e, ok := m.Body.(*icmp.Echo)
		if !ok || e.ID != p.id || len(e.Data) != pingPayload {
			continue
		}
		p.reply(binary.BigEndian.Uint64(e.Data), time.Now())
	}
}

func (p *Pinger) reply(seq uint64, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if seq >= uint64(len(p.sent)) || p.rtt[seq] != 0 {
		return
	}
	p.rtt[seq] = max(at.Sub(p.sent[seq]), 1)
	p.answered = max(p.answered, int(seq)+1)
}

// Mark is a place in the pinger's sequence: the number of the next request.
func (p *Pinger) Mark() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.sent)
}

// PingReport is what became of some pings.
type PingReport struct {
	// Sent and Lost count requests.
	Sent, Lost int
	// LostAt are the times at which the lost ones were sent.
	LostAt []time.Time
	// WorstRTT is the longest round trip of those that were answered.
	WorstRTT time.Duration
}

// Report waits until it is known of each request from the mark on up to now
// whether it is answered or lost, and counts them: when a later one is answered,
// or none has been for 10 s.
func (p *Pinger) Report(ctx context.Context, from int) (PingReport, error) {
	to := p.Mark()
	deadline := time.NewTimer(pingTimeout)
	defer deadline.Stop()
	t := time.NewTicker(PingInterval)
	defer t.Stop()
	for {
		if r, known := p.count(from, to); known {
			return r, nil
		}
		select {
		case <-deadline.C:
			r, _ := p.count(from, to)
			return r, nil
		case <-t.C:
		case <-ctx.Done():
			r, _ := p.count(from, to)
			return r, ctx.Err()
		}
	}
}

// count also tells whether the count is final: none is without an answer, or
// what is, is lost.
func (p *Pinger) count(from, to int) (r PingReport, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.Sent = to - from
	for i := from; i < to; i++ {
		if p.rtt[i] == 0 {
			r.Lost++
			r.LostAt = append(r.LostAt, p.sent[i])
		}
		r.WorstRTT = max(r.WorstRTT, p.rtt[i])
	}
	return r, r.Lost == 0 || p.answered >= to
}

// Await waits until n replies have come to requests sent from now on: the
// guest is reachable.
func (p *Pinger) Await(ctx context.Context, n int) error {
	from := p.Mark()
	t := time.NewTicker(PingInterval)
	defer t.Stop()
	for {
		if r, _ := p.count(from, p.Mark()); r.Sent-r.Lost >= n {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("the guest does not answer pings: %w", ctx.Err())
		}
	}
}
