// Package launcher looks into virt-launcher's container for what the QEMU in it
// can do, before that QEMU runs.
package launcher

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

// ErrNotVisible says that no virt-launcher of the pod was found: it does not
// run yet, or the agent does not share the node's process namespace.
var ErrNotVisible = errors.New("no virt-launcher process of the pod is visible")

// device is the name of QEMU's device for a vfio-user server (QEMU >= 10.1,
// hw/vfio-user/pci.c, TYPE_VFIO_USER_PCI). A QEMU that was built with it holds
// the name as a string; so does none that was not.
const device = "vfio-user-pci"

// binaries are where images have QEMU: CentOS's, which KubeVirt's own
// virt-launcher image is made of, and everybody else's.
var binaries = []string{"usr/libexec/qemu-kvm", "usr/bin/qemu-system-x86_64", "usr/bin/qemu-kvm"}

// maxBinary bounds what is read of a file that the container's image brought.
const maxBinary = 512 << 20

// QEMUs looks for QEMUs in virt-launcher's containers of a node. Safe for
// concurrent use.
type QEMUs struct {
	// proc is the process file system of the node.
	proc string

	mu    sync.Mutex
	known map[identity]bool
}

// identity is that of a file's content, as far as one may assume.
type identity struct {
	dev, ino    uint64
	size, mtime int64
}

// New returns a QEMUs that reads the process file system at proc, "/proc" where
// the node's processes are visible.
func New(proc string) *QEMUs { return &QEMUs{proc: proc, known: map[identity]bool{}} }

// HasVFIOUser tells whether the QEMU in the pod's compute container has the
// device that VFs are attached by. The error wraps ErrNotVisible when that
// container's process was not found.
func (q *QEMUs) HasVFIOUser(pod types.UID) (bool, error) {
	pids, err := q.launchers(pod)
	if err != nil {
		return false, err
	}
	if len(pids) == 0 {
		return false, fmt.Errorf("pod %s: %w", pod, ErrNotVisible)
	}
	var errs []error
	for _, pid := range pids {
		has, err := q.inRootOf(pid)
		if err == nil {
			return has, nil
		}
		errs = append(errs, err)
	}
	return false, fmt.Errorf("pod %s: %w", pod, errors.Join(errs...))
}

// launchers returns the processes of virt-launcher in the pod.
func (q *QEMUs) launchers(pod types.UID) ([]int, error) {
	entries, err := os.ReadDir(q.proc)
	if err != nil {
		return nil, fmt.Errorf("processes of the node: %w", err)
	}
	// The kubelet's cgroup drivers write the UID with dashes or underscores.
	names := []string{"pod" + string(pod), "pod" + strings.ReplaceAll(string(pod), "-", "_")}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join(q.proc, e.Name())
		comm, err := os.ReadFile(filepath.Join(dir, "comm")) // cut to 15 bytes by the kernel
		if err != nil || !strings.HasPrefix(string(comm), "virt-launcher") {
			continue
		}
		groups, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil {
			continue
		}
		if strings.Contains(string(groups), names[0]) || strings.Contains(string(groups), names[1]) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// inRootOf looks at the QEMU in the root directory of a process. Symbolic links
// in there, which the image made, do not lead out of it.
func (q *QEMUs) inRootOf(pid int) (bool, error) {
	root, err := unix.Open(filepath.Join(q.proc, strconv.Itoa(pid), "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("root of process %d: %w", pid, err)
	}
	defer unix.Close(root)
	for _, name := range binaries {
		fd, err := unix.Openat2(root, name, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("/%s: %w", name, err)
		}
		f := os.NewFile(uintptr(fd), name)
		has, err := q.inFile(f)
		f.Close()
		return has, err
	}
	return false, fmt.Errorf("no QEMU in the virt-launcher container (looked for %s)", strings.Join(binaries, ", "))
}

func (q *QEMUs) inFile(f *os.File) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, fmt.Errorf("/%s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxBinary {
		return false, fmt.Errorf("/%s is no file of at most %d bytes", f.Name(), maxBinary)
	}
	id := identity{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano()}
	q.mu.Lock()
	has, known := q.known[id]
	q.mu.Unlock()
	if known {
		return has, nil
	}
	has, err := contains(io.LimitReader(f, maxBinary), device)
	if err != nil {
		return false, fmt.Errorf("/%s: %w", f.Name(), err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.known[id] = has
	return has, nil
}

// contains tells whether text occurs in what r has.
func contains(r io.Reader, text string) (bool, error) {
	buf := make([]byte, 256<<10)
	kept := 0
	for {
		n, err := r.Read(buf[kept:])
		if bytes.Contains(buf[:kept+n], []byte(text)) {
			return true, nil
		}
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		// What may be the beginning of text is looked at again.
		keep := min(kept+n, len(text)-1)
		copy(buf, buf[kept+n-keep:kept+n])
		kept = keep
	}
}
