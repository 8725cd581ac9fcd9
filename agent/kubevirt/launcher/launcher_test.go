package launcher

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const uid = "0a1b2c3d-0000-1111-2222-333344445555"

// process makes a process file system with one process.
func process(t *testing.T, proc, pid, comm, cgroup string) (root string) {
	t.Helper()
	dir := filepath.Join(proc, pid)
	root = filepath.Join(dir, "root")
	for _, d := range []string{"usr/libexec", "usr/bin"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "comm"), comm+"\n")
	write(t, filepath.Join(dir, "cgroup"), cgroup)
	return root
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestHasVFIOUser(t *testing.T) {
	with := "\x7fELF" + strings.Repeat("x", 256<<10-10) + device + "\x00rest" // lies across two reads
	systemd := "12:cpu:/\n0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice/cri-containerd-1.scope\n"
	cgroupfs := "0::/../../kubepods/burstable/pod" + uid + "/abc\n"
	for name, tc := range map[string]struct {
		lay  func(t *testing.T, proc string)
		has  bool
		want string // of the error
	}{
		"CentOS, with": {lay: func(t *testing.T, proc string) {
			write(t, filepath.Join(process(t, proc, "7", "virt-launcher-m", systemd), "usr/libexec/qemu-kvm"), with)
		}, has: true},
		"Debian, with": {lay: func(t *testing.T, proc string) {
			write(t, filepath.Join(process(t, proc, "7", "virt-launcher", cgroupfs), "usr/bin/qemu-system-x86_64"), with)
		}, has: true},
		"without": {lay: func(t *testing.T, proc string) {
			write(t, filepath.Join(process(t, proc, "7", "virt-launcher", cgroupfs), "usr/bin/qemu-system-x86_64"), "\x7fELF vfio-pci vfio-use")
		}},
		"a link within the image": {lay: func(t *testing.T, proc string) {
			root := process(t, proc, "7", "virt-launcher", cgroupfs)
			write(t, filepath.Join(root, "usr/bin/real"), with)
			if err := os.Symlink("/usr/bin/real", filepath.Join(root, "usr/bin/qemu-kvm")); err != nil {
				t.Fatal(err)
			}
		}, has: true},
		"another pod's": {lay: func(t *testing.T, proc string) {
			write(t, filepath.Join(process(t, proc, "7", "virt-launcher", "0::/pod1\n"), "usr/libexec/qemu-kvm"), with)
		}, want: "no virt-launcher process"},
		"the sidecar": {lay: func(t *testing.T, proc string) {
			write(t, filepath.Join(process(t, proc, "7", "compsc", cgroupfs), "usr/libexec/qemu-kvm"), with)
		}, want: "no virt-launcher process"},
		"no process": {lay: func(*testing.T, string) {}, want: "no virt-launcher process"},
		"no QEMU": {lay: func(t *testing.T, proc string) { process(t, proc, "7", "virt-launcher", cgroupfs) },
			want: "no QEMU in the virt-launcher container"},
		"no file": {lay: func(t *testing.T, proc string) {
			if err := unix.Mkfifo(filepath.Join(process(t, proc, "7", "virt-launcher", cgroupfs), "usr/libexec/qemu-kvm"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, want: "is no file"},
		"a link out of the image": {lay: func(t *testing.T, proc string) {
			outside := filepath.Join(t.TempDir(), "f")
			write(t, outside, with)
			if err := os.Symlink(outside, filepath.Join(process(t, proc, "7", "virt-launcher", cgroupfs), "usr/libexec/qemu-kvm")); err != nil {
				t.Fatal(err)
			}
		}, want: "no QEMU"},
		"one that just ended": {lay: func(t *testing.T, proc string) {
			if err := os.RemoveAll(process(t, proc, "6", "virt-launcher", cgroupfs)); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(process(t, proc, "7", "virt-launcher", cgroupfs), "usr/libexec/qemu-kvm"), with)
		}, has: true},
	} {
		t.Run(name, func(t *testing.T) {
			proc := t.TempDir()
			write(t, filepath.Join(proc, "uptime"), "1")
			tc.lay(t, proc)
			q := New(proc)
			for range 2 {
				has, err := q.HasVFIOUser(uid)
				if has != tc.has || (err != nil) != (tc.want != "") || err != nil && !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%v, %v; want %v, error %q", has, err, tc.has, tc.want)
				}
				if errors.Is(err, ErrNotVisible) != strings.HasPrefix(tc.want, "no virt-launcher") {
					t.Errorf("error %v", err)
				}
			}
		})
	}
	if _, err := New("/nonexistent").HasVFIOUser(uid); err == nil {
		t.Error("no process file system, and no error")
	}
}

// A file that was replaced is looked at again, one that was not is not.
func TestKnown(t *testing.T) {
	proc := t.TempDir()
	path := filepath.Join(process(t, proc, "7", "virt-launcher", "0::/pod"+uid+"\n"), "usr/libexec/qemu-kvm")
	write(t, path, device)
	q := New(proc)
	if has, err := q.HasVFIOUser(uid); !has || err != nil {
		t.Fatal(has, err)
	}
	for id := range q.known {
		q.known[id] = false
	}
	if has, err := q.HasVFIOUser(uid); has || err != nil {
		t.Error("a file that is known was read again", err)
	}
	write(t, path, device+" another")
	if has, err := q.HasVFIOUser(uid); !has || err != nil {
		t.Error("a new file was not read", err)
	}
}
