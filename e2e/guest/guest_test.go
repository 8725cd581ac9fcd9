//go:build e2e

package guest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/stream"
)

// cacheDir is where hack/ puts what it makes.
func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("COMPSC_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "compsc")
}

// boot starts a guest with an emulated e1000e behind QEMU's user-mode network
// and returns its command port, the socket that leads to its stream service,
// and a channel that is closed when QEMU has ended.
func boot(t *testing.T, ctx context.Context, release string) (*proto.Client, string, <-chan struct{}) {
	t.Helper()
	cache := cacheDir(t)
	tree := filepath.Join(cache, "libvirt")
	dir, err := os.MkdirTemp(filepath.Join(tree, "tmp"), "guest-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, name := range []string{"vmlinuz", "initramfs.gz"} {
		data, err := os.ReadFile(filepath.Join(cache, "guest", release, name))
		if err != nil {
			t.Fatalf("%v (make guest makes it)", err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0") // to learn a free port
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	inside := strings.TrimPrefix(dir, tree)
	var console strings.Builder
	qemu := exec.CommandContext(ctx, "chroot", tree, "qemu-system-x86_64",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", "q35", "-accel", "tcg", "-cpu", "qemu64", "-m", "192M",
		"-kernel", inside+"/vmlinuz", "-initrd", inside+"/initramfs.gz",
		"-append", "console=ttyS0 quiet panic=-1 nokaslr mitigations=off compsc.ip=192.0.2.10/24 compsc.mtu=1400",
		"-serial", "stdio", "-serial", "unix:"+inside+"/command,server=on,wait=off",
		"-netdev", fmt.Sprintf("user,id=n0,net=192.0.2.0/24,restrict=on,hostfwd=tcp:%s-192.0.2.10:%d", address, stream.Port),
		"-device", "e1000e,netdev=n0,bus=pcie.0,addr=0x5,romfile=")
	qemu.Stdout, qemu.Stderr = &console, &console
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = qemu.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = qemu.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("console of the guest:\n%s", console.String())
		}
	})
	client := proto.NewClient(dialUnix(t, ctx, filepath.Join(dir, "command"), ended))
	t.Cleanup(func() { client.Close() })
	return client, address, ended
}

// dialUnix connects to a socket as soon as it is there.
func dialUnix(t *testing.T, ctx context.Context, path string, ended <-chan struct{}) net.Conn {
	t.Helper()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn
		}
		select {
		case <-again.C:
		case <-ended:
			t.Fatal("QEMU ended at once")
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
}

// waitStats polls the guest's counters until they satisfy cond.
func waitStats(t *testing.T, ctx context.Context, c *proto.Client, what string, cond func(proto.Stats) bool) {
	t.Helper()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		stats, err := c.Stats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(stats) == 1 && cond(stats[0]) {
			return
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			t.Fatalf("%s: not within the time: %+v", what, stats)
		}
	}
}

func TestGuest(t *testing.T) {
	for _, release := range []string{"bookworm", "trixie"} {
		t.Run(release, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			client, address, ended := boot(t, ctx, release)
			info, err := client.WaitUp(ctx, 1)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("up %v after its kernel started: %+v", info.Uptime, info)
			nic := info.Interfaces[0]
			if nic.PCI != "0000:00:05.0" || nic.Driver != "e1000e" || nic.MTU != 1400 || !nic.Up || !slices.Contains(nic.Addresses, "192.0.2.10/24") {
				t.Errorf("interface: %+v", nic)
			}
			checkStream(t, ctx, client, address)
			checkActions(t, ctx, client)
			if err := client.Run(ctx, proto.Action{Name: proto.ActionReboot}); err != nil {
				t.Error(err)
			}
			select {
			case <-ended:
			case <-ctx.Done():
				t.Error("QEMU did not end after the guest's reboot")
			}
		})
	}
}

// checkStream holds a stream open for a while and compares what both ends say.
func checkStream(t *testing.T, ctx context.Context, client *proto.Client, address string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := stream.Run(ctx, conn, 4711, 1<<20)
	waitStats(t, ctx, client, "traffic", func(s proto.Stats) bool {
		return s.Driver["rx_bytes"] > 1<<19 && s.Kernel["rx_bytes"] > 1<<19 && len(s.Interrupts) > 0
	})
	here, err := s.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	streams, err := client.Streams(ctx)
	if err != nil || len(streams) != 1 {
		t.Fatalf("the guest's streams: %+v, %v", streams, err)
	}
	there := streams[0]
	if !here.Intact || !there.Intact || here.Sent != there.Received || there.Sent != here.Received {
		t.Errorf("stream: here %+v, in the guest %+v", here, there)
	}
}

// checkActions has the guest change its interface and checks that it did, and
// that the loss of the link was noticed.
func checkActions(t *testing.T, ctx context.Context, client *proto.Client) {
	t.Helper()
	nic := func() proto.Interface {
		t.Helper()
		info, err := client.WaitUp(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		return info.Interfaces[0]
	}
	run := func(a proto.Action) {
		t.Helper()
		if err := client.Run(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	if resets, err := client.Resets(ctx); err != nil || resets.Count != 0 {
		t.Errorf("resets before any: %+v, %v", resets, err)
	}
	before := nic()
	run(proto.Action{Name: proto.ActionMTU, MTU: 1300})
	if got := nic().MTU; got != 1300 {
		t.Errorf("MTU %d, want 1300", got)
	}
	run(proto.Action{Name: proto.ActionLink, Up: false})
	if nic().Up {
		t.Error("the interface is up after it was set down")
	}
	run(proto.Action{Name: proto.ActionLink, Up: true})
	if _, err := client.WaitUp(ctx, 1); err != nil {
		t.Error(err)
	}
	if after := nic(); after.CarrierDowns <= before.CarrierDowns {
		t.Errorf("losses of the link: %d before it was set down, %d after", before.CarrierDowns, after.CarrierDowns)
	}
	run(proto.Action{Name: proto.ActionVLAN, VLAN: 7, Up: true})
	run(proto.Action{Name: proto.ActionVLAN, VLAN: 7, Up: true}) // a repeated request
	run(proto.Action{Name: proto.ActionVLAN, VLAN: 7})
	run(proto.Action{Name: proto.ActionRebind})
	if _, err := client.WaitUp(ctx, 1); err != nil {
		t.Error(err)
	}
	if got := nic(); got.MTU != 1400 || !slices.Contains(got.Addresses, "192.0.2.10/24") {
		t.Errorf("interface after the driver was bound anew: %+v", got)
	}
	if err := client.Run(ctx, proto.Action{Name: proto.ActionLink, Interface: "none"}); err == nil {
		t.Error("an action on an interface that is not there: no error")
	}
}
