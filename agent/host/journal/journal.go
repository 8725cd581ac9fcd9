// Package journal keeps on disk how a VF was before it was prepared, so that
// it can be put back exactly that way, also by an agent that was started after
// the one that prepared it had crashed. One file for each VF.
package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Version of the files' format.
const Version = 1

// maxFile bounds a file: an entry has some 500 bytes.
const maxFile = 64 << 10

// Settings are what a PF's administration says of one VF (ip-link(8), "vf").
type Settings struct {
	// MAC is the address that the administrator set, or the guest; all zero
	// for none.
	MAC string `json:"mac"`
	// VLAN is the port VLAN, 0 for none, with its priority and its protocol:
	// 0x8100 (802.1Q) or 0x88a8 (802.1ad), 0 if the kernel does not tell.
	VLAN  int `json:"vlan"`
	QoS   int `json:"qos"`
	Proto int `json:"proto"`
	// SpoofCheck: frames with other source addresses are dropped.
	SpoofCheck bool `json:"spoofCheck"`
	// Trust: the VF may use what the PF grants trusted VFs only.
	Trust bool `json:"trust"`
	// MinRate and MaxRate limit what it transmits, in Mbit/s, 0 for no limit.
	MinRate int `json:"minRate"`
	MaxRate int `json:"maxRate"`
	// LinkState is 0 for the PF's, 1 for always up, 2 for always down
	// (IFLA_VF_LINK_STATE_*).
	LinkState uint32 `json:"linkState"`
}

// Entry is a VF as it was found.
type Entry struct {
	// Version is set by Save.
	Version int `json:"version"`
	// VF and PF are PCI addresses, Index the VF's number on its PF.
	VF    string `json:"vf"`
	PF    string `json:"pf"`
	Index int    `json:"index"`
	// Boot is the kernel's boot id, and Node the VF's node in sysfs, which is
	// another when the VF was removed and came back: an entry of another boot
	// or node is about a VF that is no more.
	Boot string `json:"boot"`
	Node uint64 `json:"node"`
	// VFs is how many VFs the PF had.
	VFs int `json:"vfs"`
	// Driver that was bound, empty for none, and the function's
	// driver_override, empty for none.
	Driver   string `json:"driver"`
	Override string `json:"override"`
	// Settings of the PF for the VF.
	Settings Settings `json:"settings"`
	// MAC that the VF was prepared with, empty for none.
	PreparedMAC string `json:"preparedMAC,omitempty"`
	// Released: the PF's settings are back, and the driver is to follow.
	Released bool `json:"released,omitempty"`
}

// Journal is a directory of entries. It is safe for concurrent use.
type Journal struct {
	dir string
	mu  sync.Mutex
}

var pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// Open returns the journal in dir, which it makes if it is not there.
func Open(dir string) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &Journal{dir: dir}, nil
}

const suffix = ".json"

func (j *Journal) path(vf string) (string, error) {
	if !pciAddress.MatchString(vf) {
		return "", fmt.Errorf("journal: %.32q is no PCI address such as 0000:03:10.0", vf)
	}
	return filepath.Join(j.dir, vf+suffix), nil
}

// Save writes an entry, in place of what there is of its VF. When it returns
// without error the entry survives a crash of the machine.
func (j *Journal) Save(e Entry) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	path, err := j.path(e.VF)
	if err != nil {
		return err
	}
	e.Version = Version
	if err := e.validate(); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	b, err := json.MarshalIndent(e, "", "  ")
	if err == nil {
		err = writeDurably(path, append(b, '\n'))
	}
	if err == nil {
		err = syncDir(j.dir)
	}
	if err != nil {
		return fmt.Errorf("journal: VF %s: %w", e.VF, err)
	}
	return nil
}

// writeDurably replaces a file by a new one that is wholly on disk.
func writeDurably(path string, b []byte) (err error) {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	return os.Rename(path+".new", path)
}

func syncDir(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fsync(fd), unix.Close(fd))
}

// Load returns the entry of a VF; ok is false if there is none.
func (j *Journal) Load(vf string) (e Entry, ok bool, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	path, err := j.path(vf)
	if err != nil {
		return e, false, err
	}
	b, err := readBounded(path)
	if errors.Is(err, fs.ErrNotExist) {
		return e, false, nil
	}
	if err == nil {
		e, err = decode(b)
	}
	if err == nil && e.VF != vf {
		err = fmt.Errorf("it is about VF %s", e.VF)
	}
	if err != nil {
		return Entry{}, false, fmt.Errorf("journal: %s: %w; put the VF back by hand (ip link set PF vf N ...), then remove the file", path, err)
	}
	return e, true, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, maxFile+1)
	n, err := f.Read(b)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}

func decode(b []byte) (Entry, error) {
	var e Entry
	if len(b) > maxFile {
		return e, fmt.Errorf("more than %d bytes", maxFile)
	}
	// The version first: a later one may have other fields.
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return e, err
	}
	if v.Version != Version {
		return e, fmt.Errorf("format %d, want %d: it was written by another release", v.Version, Version)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return Entry{}, err
	}
	if err := e.validate(); err != nil {
		return Entry{}, err
	}
	return e, nil
}

func (e *Entry) validate() error {
	s := e.Settings
	switch {
	case !pciAddress.MatchString(e.VF) || !pciAddress.MatchString(e.PF):
		return fmt.Errorf("VF %.32q of PF %.32q: want PCI addresses such as 0000:03:10.0", e.VF, e.PF)
	case e.Index < 0 || e.Index > 65535 || e.VFs < 0 || e.VFs > 65535:
		return fmt.Errorf("VF number %d of %d", e.Index, e.VFs)
	case !driverName(e.Driver) || !driverName(e.Override):
		return fmt.Errorf("driver %.64q, override %.64q: no names of drivers", e.Driver, e.Override)
	case s.VLAN < 0 || s.VLAN > 4094 || s.QoS < 0 || s.QoS > 7 || s.Proto < 0 || s.Proto > 65535:
		return fmt.Errorf("VLAN %d, QoS %d, protocol %#x", s.VLAN, s.QoS, s.Proto)
	case s.MinRate < 0 || s.MaxRate < 0 || s.LinkState > 2:
		return fmt.Errorf("rates %d and %d, link state %d", s.MinRate, s.MaxRate, s.LinkState)
	}
	return nil
}

// driverName tells whether s can be a driver's name; the empty one is none.
func driverName(s string) bool {
	return len(s) < 64 && s != "." && s != ".." && !strings.ContainsAny(s, "/\x00\n ")
}

// Remove forgets a VF. It is fine if there is no entry.
func (j *Journal) Remove(vf string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	path, err := j.path(vf)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal: %w", err)
	}
	if err := syncDir(j.dir); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// List returns the VFs that there are entries of, by PCI address.
func (j *Journal) List() ([]string, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	files, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var out []string
	for _, f := range files {
		// Half-written files of a crash have another suffix.
		if vf, ok := strings.CutSuffix(f.Name(), suffix); ok && pciAddress.MatchString(vf) {
			out = append(out, vf)
		}
	}
	return out, nil
}
