package model

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// tapBuffer holds the largest frame a tap can give.
const tapBuffer = 64<<10 + 256

// TapWire is a wire that ends in a tap device of the host. It owns the file.
// Its methods are safe for concurrent use, except that only one Run may be
// under way.
type TapWire struct {
	file *os.File
}

var _ Wire = (*TapWire)(nil)

// NewTapWire returns a wire on an open tap: IFF_TAP|IFF_NO_PI without
// IFF_VNET_HDR, already attached to its interface, and in non-blocking mode
// when it was made an *os.File, so that the runtime's poller waits for it.
func NewTapWire(f *os.File) *TapWire { return &TapWire{file: f} }

// Transmit gives a frame to the host's side of the tap. It fails, and the
// frame is lost, when the interface is down or the tap closed.
func (t *TapWire) Transmit(frame []byte) error {
	if _, err := t.file.Write(frame); err != nil {
		return fmt.Errorf("write frame to tap: %w", err)
	}
	return nil
}

// Run gives every frame from the host's side to deliver, which must not keep
// it, until ctx ends or the tap is closed; then it returns nil. It fails when
// the tap goes away, or cannot be waited for because it is in blocking mode.
func (t *TapWire) Run(ctx context.Context, deliver func(frame []byte)) error {
	// Of a closed file the first read will tell.
	if err := t.file.SetReadDeadline(time.Time{}); errors.Is(err, os.ErrNoDeadline) {
		return fmt.Errorf("wait for frames from tap (was it opened non-blocking?): %w", err)
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_ = t.file.SetReadDeadline(time.Unix(1, 0)) // fails only on a closed file
	})
	defer func() {
		if !stop() {
			<-woken // lest it disturbs the next Run
		}
	}()
	buf := make([]byte, tapBuffer)
	for {
		n, err := t.file.Read(buf)
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("read frame from tap: %w", err)
		}
		deliver(buf[:n])
	}
}

// Close closes the tap and ends Run.
func (t *TapWire) Close() error { return t.file.Close() }
