//go:build e2enested

package nested

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"compsc.io/compsc/agent/device"
	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/qemu"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/sriov/job"
)

const (
	// iface is the VM's interface, slot its place in the guest.
	iface, slot = "net1", 0x10
	// sidecar is the container that the device process runs in.
	sidecar = "hook-sidecar-0"
	// guestMAC is the address that the PFs give its VFs.
	guestMAC = "52:54:00:c0:5c:01"
	// domainDir is where QEMU finds its own files.
	domainDir = "/run/domain"
	// memory is the guest's: little, as all of it is pinned, and sent.
	memory = "128M"
	// patience is for how many milliseconds QEMU waits for an answer of the
	// device process. The default is 5 s, and an emulated processor takes
	// longer to pin the guest's memory.
	patience = 120_000
	// callTimeout bounds a call of the device process that waits for nothing.
	callTimeout = 30 * time.Second
)

// pod is what runs for a VM on one of the two sides: a VF, the device process
// and QEMU.
type pod struct {
	*rig
	name          string
	vf            string
	hooks, domain string
	device, qemu  *lab.Process
	ctl           pb.DeviceClient
	monitor       *qemu.Monitor
	events        events
}

// startPod has a device process mediate the VF.
func (r *rig) startPod(name, role, vf string, epoch uint64) *pod {
	r.Helper()
	p := &pod{rig: r, name: name, vf: vf, hooks: filepath.Join(r.lab.Dir, name, "h"), domain: filepath.Join(r.lab.Dir, name, "d")}
	p.events.news = make(chan struct{})
	for _, dir := range []string{p.hooks, p.domain} {
		r.must(os.MkdirAll(dir, 0o700))
	}
	var err error
	p.device, err = r.lab.Start(lab.Command{
		Name: "device process of " + name, Path: filepath.Join(job.Dir, "compsc"),
		Args: []string{"device", "--sidecar", sidecar, "--hooks-dir", p.hooks}, Log: p.log("device"),
	})
	r.must(err)
	prepared, err := r.host.Prepare(r.ctx, host.Request{Address: vf, MAC: guestMAC, Silent: role == handoff.RoleTarget})
	r.must(err)
	defer prepared.Close()
	r.until("the device process of "+name, func() bool {
		_, err := os.Stat(p.socket(device.HandoffSocket))
		return err == nil
	})
	r.must(handoff.Send(r.ctx, p.socket(device.HandoffSocket), handoff.Handoff{
		Interface: iface, Slot: slot, Of: 1, VF: vf, PF: prepared.PF, Family: prepared.VF.Family, DeviceID: prepared.VF.DeviceID,
		Backend: prepared.Backend, MAC: guestMAC, VLAN: prepared.VLAN, Trust: prepared.Trust, Epoch: epoch, Role: role,
		VFIO: handoff.VFIO{API: prepared.API},
	}, prepared.Files))
	conn, err := grpc.NewClient("unix:"+p.socket(device.ControlSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	r.must(err)
	r.Cleanup(func() { conn.Close() })
	p.ctl = pb.NewDeviceClient(conn)
	r.Cleanup(func() {
		if r.Failed() {
			for _, part := range []string{"device", "qemu"} {
				b, _ := os.ReadFile(p.log(part))
				r.Logf("%s of %s:\n%s", part, name, b[max(0, len(b)-8<<10):])
			}
			b, _ := os.ReadFile(filepath.Join(p.domain, "console"))
			r.Logf("console of %s:\n%s", name, b[max(0, len(b)-4<<10):])
		}
	})
	return p
}

// socket is the path of a socket of the device process.
func (p *pod) socket(name string) string {
	return filepath.Join(p.hooks, filepath.Base(kubevirt.SidecarDeviceDir()), name)
}

func (p *pod) log(part string) string { return filepath.Join(p.lab.Dir, "log", p.name+"-"+part) }

// until waits for a condition that nobody announces.
func (r *rig) until(what string, ok func() bool) {
	r.Helper()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for !ok() {
		select {
		case <-again.C:
		case <-r.ctx.Done():
			r.Fatalf("waiting for %s: %v", what, context.Cause(r.ctx))
		}
	}
}

// startQEMU starts the VM, or has it wait for an incoming migration.
func (p *pod) startQEMU(incoming bool) {
	p.Helper()
	quote := func(v map[string]any) string {
		b, err := json.Marshal(v)
		p.must(err)
		return string(b)
	}
	hooksDir := kubevirt.ComputeDeviceDir(sidecar)
	unix := func(name string) map[string]string {
		return map[string]string{"type": "unix", "path": filepath.Join(hooksDir, name)}
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		// Without what a guest of this guest would need.
		"-machine", "q35,memory-backend=ram,graphics=off", "-accel", "kvm", "-cpu", "host,-svm", "-smp", "1", "-m", memory,
		"-object", "memory-backend-memfd,id=ram,share=on,hugetlb=on,hugetlbsize=2M,size=" + memory,
		"-kernel", domainDir + "/kernel", "-initrd", domainDir + "/initrd",
		"-append", "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests audit=0 apparmor=0 selinux=0 nowatchdog rcupdate.rcu_expedited=1 compsc.ip=" + p.lab.GuestIP().String(),
		"-serial", "file:" + domainDir + "/console",
		"-serial", "unix:" + domainDir + "/agent.sock,server=on,wait=off",
		"-qmp", "unix:" + domainDir + "/monitor.sock,server=on,wait=off",
		"-qmp", "unix:" + hooksDir + "/" + device.MonitorSocket + ",server=on,wait=off",
		"-blockdev", quote(map[string]any{"driver": "nbd", "node-name": "gate0", "export": "", "reconnect-delay": 3, "server": unix(device.GateSocket)}),
		"-blockdev", "driver=qcow2,node-name=gateq,file=gate0",
		"-device", quote(map[string]any{"driver": "vfio-user-pci", "id": "vf", "bus": "pcie.0", "addr": fmt.Sprintf("%#x", slot), "rombar": 0, "x-msg-timeout": patience, "socket": unix(device.VFSocket(slot))}),
	}
	if incoming {
		args = append(args, "-incoming", "defer", "-S")
	}
	in := func(path string) string { return filepath.Join(job.TreeDir, path) }
	var err error
	p.qemu, err = p.lab.Start(lab.Command{
		Name: "QEMU of " + p.name, Path: "/usr/bin/qemu-system-x86_64", Args: args, Env: []string{"PATH=/usr/bin"}, Chroot: job.TreeDir,
		Mounts: []lab.Mount{
			{Target: in("run")},
			{Source: "/dev", Target: in("dev")},
			{Source: p.hooks, Target: in(filepath.Join("run", strings.TrimPrefix(kubevirt.HooksDir, "/var/run"), sidecar))},
			{Source: p.domain, Target: in(domainDir)},
			{Source: filepath.Join(job.Dir, "guest-vmlinuz"), Target: in(domainDir + "/kernel"), ReadOnly: true},
			{Source: filepath.Join(job.Dir, "guest-initramfs.gz"), Target: in(domainDir + "/initrd"), ReadOnly: true},
		},
		Log: p.log("qemu"),
	})
	p.must(err)
	ctx, cancel := context.WithTimeout(p.ctx, bootTimeout)
	defer cancel()
	p.monitor, err = qemu.Dial(ctx, filepath.Join(p.domain, "monitor.sock"), p.events.add, func() { p.events.add(qemu.Event{Name: "closed"}) })
	p.must(err)
}

// qmp runs a command of QEMU's.
func (p *pod) qmp(command string, args map[string]any) {
	p.Helper()
	p.must(p.monitor.Run(p.ctx, command, args, nil))
}

func (p *pod) capabilities(names ...string) {
	p.Helper()
	var list []map[string]any
	for _, n := range names {
		list = append(list, map[string]any{"capability": n, "state": true})
	}
	p.qmp("migrate-set-capabilities", map[string]any{"capabilities": list})
}

// await waits for QEMU to tell one of these, and returns which.
func (p *pod) await(want ...string) string {
	p.Helper()
	for {
		got, news := p.events.find(append(want, "closed"))
		switch {
		case got == "closed":
			p.Fatalf("QEMU of %s ended while it was to tell %v: %s", p.name, want, p.qemu.Tail(2000))
		case got != "":
			return got
		}
		select {
		case <-news:
		case <-p.ctx.Done():
			p.Fatalf("QEMU of %s does not tell %v: %v", p.name, want, context.Cause(p.ctx))
		}
	}
}

// guest speaks to the guest.
func (p *pod) guest(bound time.Duration, do func(context.Context, *proto.Client) error) {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, bound)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(p.domain, "agent.sock"))
	p.must(err)
	c := proto.NewPatientClient(conn)
	defer c.Close()
	p.must(do(ctx, c))
}

// end stops QEMU and the device process, as when KubeVirt deletes a pod, and
// has the VF put back the way it was.
func (p *pod) end() {
	p.Helper()
	p.qemu.Stop(0)
	p.device.Stop(10 * time.Second)
	p.must(p.host.Release(p.ctx, p.vf))
}

// call bounds a call of the device process.
func call[Request, Reply any](p *pod, do func(context.Context, *Request, ...grpc.CallOption) (*Reply, error), request *Request) *Reply {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, callTimeout)
	defer cancel()
	reply, err := do(ctx, request)
	if err != nil {
		p.Fatalf("device process of %s: %T: %v", p.name, request, err)
	}
	return reply
}

// events are what a QEMU has told.
type events struct {
	mu   sync.Mutex
	told []string
	news chan struct{} // closed and replaced with each
}

func (e *events) add(event qemu.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.told = append(e.told, event.Name)
	if event.MigrationStatus != "" {
		e.told = append(e.told, fmt.Sprintf("%s:%s", event.Name, event.MigrationStatus))
	}
	close(e.news)
	e.news = make(chan struct{})
}

// find returns the first of what was told that is wanted, empty for none yet.
func (e *events) find(want []string) (string, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := slices.IndexFunc(e.told, func(t string) bool { return slices.Contains(want, t) }); i >= 0 {
		return e.told[i], e.news
	}
	return "", e.news
}
