// Deviceplugin stands in, on nodes whose VFs are modelled, for two programs
// that need real ones: the SR-IOV network device plugin, and the SR-IOV CNI
// plugin. It keeps to their conventions, so that everything else is real:
//
//   - It announces VFs to the kubelet as devices of a resource, named by their
//     PCI addresses. A container that is given some finds the addresses in the
//     variable PCIDEVICE_<resource name>.
//   - For each VF that it gives away it writes the device information file
//     (k8snetworkplumbingwg's device information specification 1.1) that
//     Multus copies into the pod's network status.
//   - Called as a CNI plugin, which it installs itself as under the name
//     "sriov", it does what that plugin does with a VF that belongs to
//     vfio-pci: it reports an interface, and leaves the network alone.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	// The CNI specification's way to call a plugin.
	if os.Getenv("CNI_COMMAND") != "" {
		cni()
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "deviceplugin:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	o := options{tell: writeInfo}
	var vfs, cniDir string
	flag.StringVar(&o.resource, "resource", "", "name of the resource, such as intel.com/intel_82599_vf")
	flag.StringVar(&vfs, "vfs", "", "PCI addresses of the node's VFs, separated by commas")
	flag.StringVar(&o.dir, "dir", "/var/lib/kubelet/device-plugins", "the kubelet's directory of device plugins")
	flag.StringVar(&cniDir, "cni-dir", "", "directory to install the CNI plugin in; empty for none")
	flag.Parse()
	o.vfs = strings.Split(vfs, ",")
	if o.resource == "" || vfs == "" || flag.NArg() > 0 {
		return errors.New("--resource and --vfs are needed, and nothing else")
	}
	if cniDir != "" {
		if err := install(filepath.Join(cniDir, "sriov")); err != nil {
			return fmt.Errorf("installing the CNI plugin: %w", err)
		}
	}
	slog.Info("announcing", "resource", o.resource, "vfs", o.vfs)
	return serve(ctx, o)
}

// install copies this program, complete at once.
func install(to string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	tmp := to + ".new"
	if err := os.WriteFile(tmp, b, 0o755); err != nil {
		return err
	}
	return os.Rename(tmp, to)
}
