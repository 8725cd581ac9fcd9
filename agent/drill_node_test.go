//go:build e2esriov

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/driver"
	"compsc.io/compsc/e2e/sriov/job"
	"compsc.io/compsc/e2e/sriov/sidecar"
)

// These run on a machine with real PFs, on one wire: each plays the NIC of a
// node of its own. Agents, device processes, vfio-pci, IOMMU and the PFs'
// driver are the real ones; QEMU, the guest's driver and the API server are
// stood in for, and an agent is killed by taking all its connections away.

// vfsPerNode is how many VFs a PF is given; the last is the VM's.
const vfsPerNode = 2

// end is one end of a migration.
type end struct {
	*labNode
	up      bool // the agent runs
	pf      card.PF
	vf      card.VF
	before  string // how the VF was
	pod     *corev1.Pod
	dir     string // of the device process
	process *exec.Cmd
	said    *said
	machine *machine
}

// said is what a process has printed.
type said struct {
	to   io.Writer
	mu   sync.Mutex
	text strings.Builder
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text.Write(p)
	return s.to.Write(p)
}

func (s *said) has(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(s.text.String(), text)
}

// drill is a VM that is to move from one PF's VF to the other's.
type drill struct {
	*migration
	src, dst *end
	memory   *os.File
	guest    *driver.NIC
	at       *end // where the VM runs
	// interrupted: the PF went down under the guest, whose driver finds its VF
	// reset and begins anew.
	interrupted bool
}

// makeVFs returns the cards with the VF of each that is the VM's, which it
// makes if they are not there.
func makeVFs(t *testing.T) (cards []card.PF, vfs []card.VF) {
	t.Helper()
	cards, err := card.List()
	if err != nil || len(cards) != 2 {
		t.Fatalf("cards %v (%v)", cards, err)
	}
	for _, c := range cards {
		list, err := c.VFs()
		if err == nil && len(list) == 0 {
			if err = c.Up(); err == nil {
				list, err = c.MakeVFs(vfsPerNode)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		vfs = append(vfs, list[vfsPerNode-1])
	}
	return cards, vfs
}

// own are settings of the administrator's own.
func own(t *testing.T, c card.PF, vf card.VF, last byte) {
	t.Helper()
	link, err := c.Link()
	if err == nil {
		err = errors.Join(netlink.LinkSetVfHardwareAddr(link, vf.Number, net.HardwareAddr{0x52, 0x54, 0, 0, 0x77, last}),
			netlink.LinkSetVfTrust(link, vf.Number, true), netlink.LinkSetVfSpoofchk(link, vf.Number, false))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// settings is in words all that the host may change of a VF.
func (e *end) settings() (string, error) {
	name, err := e.vf.Driver()
	if err != nil {
		return "", err
	}
	link, err := e.pf.Link()
	if err != nil {
		return "", err
	}
	if len(link.Attrs().Vfs) <= e.vf.Number {
		return "no VF", nil
	}
	return fmt.Sprintf("driver %q, %+v", name, link.Attrs().Vfs[e.vf.Number]), nil
}

// newDrill boots the VM on node a.
func newDrill(t *testing.T) *drill {
	t.Helper()
	d := newAttached(t)
	d.boot()
	return d
}

// newAttached has the VM's VF attached on node a.
func newAttached(t *testing.T) *drill {
	t.Helper()
	cards, vfs := makeVFs(t)
	l := newLab(t)
	l.hold = 10 * time.Second // as long as may be: processors are emulated, and an agent is started meanwhile
	d := &drill{migration: &migration{lab: l}}
	for i, name := range []string{"a", "b"} {
		n, c := l.nodes[name], cards[i]
		e := &end{labNode: n, pf: c, vf: vfs[i]}
		own(t, c, e.vf, byte(i))
		var err error
		if e.before, err = e.settings(); err != nil {
			t.Fatal(err)
		}
		journal := t.TempDir()
		n.newHost = func() Host {
			h, err := host.NewSRIOV(host.SRIOVOptions{Journal: journal, Families: map[string]string{"8086:10ca": "igbvf"}, PFs: []string{c.Name}})
			if err != nil {
				t.Error(err)
			}
			return &watchedHost{h, t, cards}
		}
		n.logLevel = slog.LevelInfo
		short, err := os.MkdirTemp("", "kubelet") // a socket's path is short
		d.must(err)
		t.Cleanup(func() { os.RemoveAll(short) })
		n.podResources = filepath.Join(short, "k.sock")
		serveKubelet(t, n.podResources, []string{"launcher-source", "launcher-target"}[i], e.vf.Address)
		n.limits = &limits{retry: 6 * time.Second, pause: 50 * time.Millisecond, call: 15 * time.Second, watch: time.Second, look: 150 * time.Millisecond}
		if i == 0 {
			d.src = e
		} else {
			d.dst = e
		}
	}
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	d.must(err)
	d.memory = os.NewFile(uintptr(fd), "guest")
	t.Cleanup(func() { d.memory.Close() })
	d.must(d.memory.Truncate(driver.MemorySize))

	d.start(d.src)
	d.start(d.dst)
	l.vmi(nil)
	d.startPod(d.src, "launcher-source", "")
	d.await("the VM's VF to be attached", func() bool { return d.src.is(pb.Phase_PHASE_RUNNING) })
	d.must(sidecar.Check(d.src.process.Process.Pid))
	return d
}

// boot starts QEMU and the guest's driver.
func (d *drill) boot() {
	d.t.Helper()
	ram, err := unix.Mmap(int(d.memory.Fd()), 0, driver.MemorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	d.must(err)
	d.src.machine, err = plugMachine(d.t, d.src.dir, "running", d.memory)
	d.must(err)
	d.must(d.src.machine.firmware())
	d.await("the monitor to be followed", d.src.machine.followed)
	d.at, d.guest = d.src, driver.New(d.src.machine, ram, guestBase)
	address, err := net.ParseMAC(mac)
	d.must(err)
	d.must(d.guest.Start(address))
	d.must(d.traffic("before"))
}

func (d *drill) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// await waits for what is somebody else's to do.
func (d *drill) await(what string, ok func() bool) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), waitLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			d.t.Fatalf("waiting for %s: not within %v", what, waitLimit)
		}
	}
}

// start and stop have an end's agent run, or killed.
func (d *drill) start(e *end) {
	if !e.up {
		e.labNode.start()
		e.up = true
	}
}

func (d *drill) stop(e *end) {
	if e.up {
		e.labNode.kill()
		e.up = false
	}
}

// startPod creates a pod with its device process, which has no privileges and may
// lock less than the guest's RAM. The agent finds it as on a node, and the process
// its sockets at a path that is short enough.
func (d *drill) startPod(e *end, name, migration string) {
	d.t.Helper()
	e.pod = d.lab.pod(name, e.name, e.vf.Address, migration)
	below, err := sidecar.Dir()
	d.must(err)
	d.t.Cleanup(func() { os.RemoveAll(below) })
	e.dir = kubevirt.DeviceDir(e.podsDir, e.pod.UID, 0)
	hooks := filepath.Dir(filepath.Dir(e.dir))
	d.must(os.MkdirAll(filepath.Dir(hooks), 0o755))
	d.must(os.Symlink(below, hooks))
	e.dir = filepath.Join(below, filepath.Base(filepath.Dir(e.dir)), filepath.Base(e.dir))
	d.must(os.Mkdir(filepath.Dir(e.dir), 0o755))
	d.must(os.Chown(filepath.Dir(e.dir), sidecar.User, sidecar.User))
	e.process = exec.Command(filepath.Join(job.Dir, "compsc"), "device", "--sidecar", kubevirt.SidecarName(0), "--hooks-dir", filepath.Dir(e.dir))
	e.said = &said{to: d.t.Output()}
	e.process.Stdout, e.process.Stderr = e.said, e.said
	d.must(sidecar.Start(e.process))
	d.t.Cleanup(func() { e.killProcess() })
	d.must(sidecar.Limit(e.process.Process.Pid, sidecar.Memlock))
}

// killProcess ends the device process at once. It may be called again.
func (e *end) killProcess() {
	_ = e.process.Process.Kill()
	_ = e.process.Wait()
}

// status asks the device process.
func (e *end) status() (*pb.StatusReply, error) {
	if e.pod == nil {
		return nil, errors.New("no pod")
	}
	d, err := newDevices(e.podsDir).get(e.pod.UID)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return d.Status(ctx, &pb.StatusRequest{})
}

func (e *end) is(phase pb.Phase) bool {
	st, err := e.status()
	return err == nil && st.GetPhase() == phase
}

// traffic sends a frame each way between the guest and the PF that it is not
// on.
func (d *drill) traffic(text string) error {
	far := d.dst.pf
	if d.at == d.dst {
		far = d.src.pf
	}
	link, err := far.Link()
	if err != nil {
		return err
	}
	fd, err := far.Listen()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	d.guest.Send(link.Attrs().HardwareAddr, text)
	buf := make([]byte, 2048)
	if err := persist(d.t.Context(), waitLimit, 10*time.Millisecond, func(context.Context) error {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) || err == nil && driver.Text(buf[:n]) != text {
			return context.DeadlineExceeded // not yet
		}
		return err
	}); err != nil {
		return fmt.Errorf("frame %q of the guest: %w", text, err)
	}
	if _, err := unix.Write(fd, driver.Frame(d.guest.MAC, link.Attrs().HardwareAddr, "to the guest "+text)); err != nil {
		return err
	}
	for {
		got, err := d.guest.Receive()
		if err != nil || got == "to the guest "+text {
			return err
		}
	}
}

// watchedHost is the real host under the eye of somebody who looks at the
// PFs' filters after all it does.
type watchedHost struct {
	Host
	t     *testing.T
	cards []card.PF
}

// macs counts the VFs for which the VM's MAC is set on a PF.
func macs(cards ...card.PF) (n int, err error) {
	for _, c := range cards {
		link, err := c.Link()
		if err != nil {
			return n, err
		}
		for _, v := range link.Attrs().Vfs {
			if strings.EqualFold(v.Mac.String(), mac) {
				n++
			}
		}
	}
	return n, nil
}

func (h *watchedHost) look(what string) {
	if n, err := macs(h.cards...); err != nil || n > 1 {
		h.t.Errorf("after %s %d VFs have the VM's MAC (%v)", what, n, err)
	}
}

func (h *watchedHost) Prepare(ctx context.Context, r host.Request) (*host.Prepared, error) {
	defer h.look("Prepare")
	p, err := h.Host.Prepare(ctx, r)
	if err == nil {
		if api, err := card.API(); err != nil || p.API != string(api) {
			h.t.Errorf("VF %s was opened by interface %s, want %s (%v)", r.Address, p.API, api, err)
		}
	}
	return p, err
}

func (h *watchedHost) Answer(ctx context.Context, address string, on bool) error {
	defer h.look("Answer")
	return h.Host.Answer(ctx, address, on)
}

func (h *watchedHost) Release(ctx context.Context, address string) error {
	defer h.look("Release")
	return h.Host.Release(ctx, address)
}
