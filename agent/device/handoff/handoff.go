// Package handoff passes a VF from the node agent to a device process: a
// description of the VF together with its file descriptors, over a unix
// socket. gRPC cannot carry descriptors, hence a protocol of its own: one
// length-prefixed JSON message each way on a connection of its own.
//
// The device process keeps the descriptors, so that an agent can be restarted
// or upgraded without disturbing a running VM.
package handoff

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Roles of the device process that receives a VF.
const (
	// RolePrimary: the VM boots or runs there.
	RolePrimary = "primary"
	// RoleTarget: the process was started for an incoming migration; the VF
	// stays silent until the state is restored.
	RoleTarget = "target"
)

// Backends of a VF.
const (
	// BackendModel is the behavioural model of the silicon; its one descriptor
	// is the queue of a tap device.
	BackendModel = "model"
	// BackendVFIO is a VF that the kernel's vfio-pci drives; its descriptors
	// are those of package vfio, for the interface that VFIO.API names.
	BackendVFIO = "vfio"
)

const (
	maxMessage = 64 << 10
	maxFiles   = 16
	// exchangeTimeout bounds one handoff on the receiving side.
	exchangeTimeout = 10 * time.Second
)

// Handoff describes one VF. Two handoffs are the same when all fields are.
type Handoff struct {
	// Interface is the VMI interface's name.
	Interface string `json:"interface"`
	// Slot is the VF's device number on bus 0 of the guest, 1 to 31.
	Slot int `json:"slot"`
	// Of is how many interfaces with a VF the VM has, 1 to 31: the device
	// process is complete when it was handed so many.
	Of int `json:"of"`
	// VF is the VF's PCI address, PF its physical function's interface name.
	VF string `json:"vf"`
	PF string `json:"pf"`
	// Family names the register family, such as "ixgbevf".
	Family string `json:"family"`
	// DeviceID is vendor:device in hexadecimal, such as "8086:10ed".
	DeviceID string `json:"deviceID"`
	// Backend says what the descriptors are.
	Backend string `json:"backend"`
	// MAC is the administratively assigned address, empty for none.
	MAC string `json:"mac,omitempty"`
	// VLAN is the port VLAN, 0 for none.
	VLAN int `json:"vlan,omitempty"`
	// Trust tells whether the PF trusts the VF.
	Trust bool `json:"trust,omitempty"`
	// Epoch is the fencing epoch of the VF's lease.
	Epoch uint64 `json:"epoch"`
	// Role is RolePrimary or RoleTarget.
	Role string `json:"role"`
	// FastPath lets the guest reach the VF's doorbells past the device process.
	FastPath bool `json:"fastPath,omitempty"`
	// Model holds what only the model backend needs.
	Model Model `json:"model,omitzero"`
	// VFIO holds what only the vfio backend needs.
	VFIO VFIO `json:"vfio,omitzero"`
}

// VFIO describes the descriptors of the vfio backend.
type VFIO struct {
	// API is "group" or "iommufd": see package vfio.
	API string `json:"api"`
}

// Model parametrises the model backend.
type Model struct {
	// ReadOnlyRXHead and ReadOnlyTXHead make writes to VFRDH and VFTDH have
	// no effect, which the datasheet leaves open.
	ReadOnlyRXHead bool `json:"readOnlyRXHead,omitempty"`
	ReadOnlyTXHead bool `json:"readOnlyTXHead,omitempty"`
	// MulticastFilterType is the PF's MO, 0 to 3.
	MulticastFilterType uint32 `json:"multicastFilterType,omitempty"`
	// MTU is the PF's own, 0 for 1500.
	MTU int `json:"mtu,omitempty"`
	// QueuePairs is how many the PF's mode gives the VF: 2, 4 or 8; 0 for 2.
	QueuePairs int `json:"queuePairs,omitempty"`
}

type reply struct {
	Error string `json:"error,omitempty"`
}

// Send passes h and its files to the device process that listens at path,
// and waits for its answer. The files stay the caller's to close. It is
// bounded by ctx and by 10 s.
func Send(ctx context.Context, path string, h Handoff, files []*os.File) error {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("device process of interface %s: %w", h.Interface, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()

	body, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if len(files) > maxFiles {
		return fmt.Errorf("handoff of %s: %d files, at most %d", h.VF, len(files), maxFiles)
	}
	fds := make([]int, len(files))
	for i, f := range files {
		// Fd would switch the file to blocking mode, which the VF's new
		// owner shares; SyscallConn does not.
		rc, err := f.SyscallConn()
		if err != nil {
			return err
		}
		if err := rc.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
			return err
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := c.(*net.UnixConn).WriteMsgUnix(frame(body), oob, nil); err != nil {
		return fmt.Errorf("handoff of %s: %w", h.VF, err)
	}
	b, err := readFrame(c)
	if err != nil {
		return fmt.Errorf("handoff of %s: no answer: %w", h.VF, err)
	}
	var r reply
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("handoff of %s: answer: %w", h.VF, err)
	}
	if r.Error != "" {
		return fmt.Errorf("handoff of %s refused: %s", h.VF, r.Error)
	}
	return nil
}

// Serve accepts handoffs on l until ctx ends, one at a time, and gives each
// to take, which becomes the owner of the files whatever it returns. Peers
// that do not run as root are refused. A broken peer ends its own connection
// only.
func Serve(ctx context.Context, l *net.UnixListener, log *slog.Logger, take func(Handoff, []*os.File) error) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("handoff socket: %w", err)
		}
		if err := serveOne(c, take); err != nil {
			log.Warn("handoff failed", "error", err)
		}
		c.Close()
	}
}

func serveOne(c *net.UnixConn, take func(Handoff, []*os.File) error) error {
	if err := c.SetDeadline(time.Now().Add(exchangeTimeout)); err != nil {
		return err
	}
	if err := checkPeer(c); err != nil {
		return err
	}
	h, files, err := receive(c)
	if err == nil {
		err = take(h, files)
	}
	var r reply
	if err != nil {
		r.Error = err.Error()
	}
	b, merr := json.Marshal(r)
	if merr != nil {
		return merr
	}
	_, werr := c.Write(frame(b))
	return errors.Join(err, werr)
}

func checkPeer(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	if cred.Uid != 0 {
		return fmt.Errorf("peer with uid %d refused: only root may hand a VF over", cred.Uid)
	}
	return nil
}

// receive reads one message; the descriptors may come with any part of it.
func receive(c *net.UnixConn) (Handoff, []*os.File, error) {
	r := &fdReader{c: c}
	b, err := readFrame(r)
	var h Handoff
	if err == nil {
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.DisallowUnknownFields()
		err = dec.Decode(&h)
	}
	if err == nil && len(r.files) > maxFiles {
		err = fmt.Errorf("%d files, at most %d", len(r.files), maxFiles)
	}
	if err != nil {
		CloseAll(r.files)
		return Handoff{}, nil, err
	}
	return h, r.files, nil
}

// CloseAll closes files.
func CloseAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// fdReader reads a unix stream and collects the descriptors passed on it.
type fdReader struct {
	c     *net.UnixConn
	files []*os.File
}

func (r *fdReader) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, on, _, _, err := r.c.ReadMsgUnix(p, oob)
	if on > 0 {
		msgs, perr := unix.ParseSocketControlMessage(oob[:on])
		if perr != nil {
			return n, perr
		}
		for i := range msgs {
			fds, perr := unix.ParseUnixRights(&msgs[i])
			if perr != nil {
				continue // not descriptors
			}
			for _, fd := range fds {
				unix.CloseOnExec(fd)
				// Non-blocking before NewFile, so that the runtime's poller
				// takes the descriptor in.
				if serr := unix.SetNonblock(fd, true); serr != nil {
					err = serr
				}
				r.files = append(r.files, os.NewFile(uintptr(fd), "handoff"))
			}
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func frame(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func readFrame(r io.Reader) ([]byte, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	l := binary.BigEndian.Uint32(n[:])
	if l > maxMessage {
		return nil, fmt.Errorf("message of %d bytes, at most %d", l, maxMessage)
	}
	b := make([]byte, l)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	return b, nil
}
