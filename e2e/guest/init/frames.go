package main

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/guest/proto"
)

// frames counts what comes in with Ethernet type proto.FrameType on any
// interface. It is safe for concurrent use.
type frames struct {
	mu     sync.Mutex
	counts map[uint64]uint64
	order  []uint64 // tokens, oldest first
}

// watchFrames counts for as long as the guest runs. A packet socket that is
// bound to no interface outlives every interface, and makes none promiscuous.
func watchFrames() (*frames, error) {
	kind := binary.BigEndian.AppendUint16(nil, proto.FrameType) // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(binary.NativeEndian.Uint16(kind)))
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	f := &frames{counts: map[uint64]uint64{}}
	go f.follow(fd)
	return f, nil
}

func (f *frames) follow(fd int) {
	defer unix.Close(fd)
	payload := make([]byte, 64)
	for {
		n, _, err := unix.Recvfrom(fd, payload, 0)
		switch {
		case err == unix.EINTR, err == unix.ENETDOWN:
		case err != nil:
			fmt.Fprintln(os.Stderr, "init: packet socket:", err)
			return
		case n >= 8:
			f.note(binary.BigEndian.Uint64(payload))
		}
	}
}

func (f *frames) note(token uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.counts[token] == 0 {
		f.order = append(f.order, token)
	}
	f.counts[token]++
	if len(f.order) > proto.MaxTokens {
		delete(f.counts, f.order[0])
		f.order = f.order[1:]
	}
}

func (f *frames) seen() map[uint64]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.counts)
}
