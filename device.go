package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/hook"
)

// deviceOptions is for extras to change.
var deviceOptions device.Options

func deviceCommand() *cobra.Command {
	var sidecar, dir string
	c := &cobra.Command{
		Use:   "device",
		Short: "Mediate the VFs of one VM (runs as a sidecar in its pod)",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return runDevice(cmd.Context(), sidecar, dir) },
	}
	f := c.Flags()
	f.StringVar(&sidecar, "sidecar", os.Getenv(kubevirt.EnvContainerName), "name of the container it runs in; default: $"+kubevirt.EnvContainerName)
	f.StringVar(&dir, "hooks-dir", kubevirt.HooksDir, "where KubeVirt mounted the sidecar's directory")
	return c
}

// isSidecar tells whether KubeVirt started this process as a hook sidecar,
// which it does without arguments.
func isSidecar() bool { return kubevirt.IsSidecarName(os.Getenv(kubevirt.EnvContainerName)) }

func runDevice(ctx context.Context, sidecar, dir string) error {
	ctx, shutdown := context.WithCancel(ctx)
	defer shutdown()
	own := filepath.Join(dir, filepath.Base(kubevirt.SidecarDeviceDir()))
	if err := os.MkdirAll(own, 0o700); err != nil {
		return err
	}
	o := deviceOptions
	o.Dir, o.QEMUDir, o.Log = own, kubevirt.ComputeDeviceDir(sidecar), slog.Default()
	process, err := device.New(o)
	if err != nil {
		return err
	}
	server, err := hook.New(hook.Options{
		Sidecar: sidecar, Gate: device.GateSocket, Monitor: device.MonitorSocket, VF: device.VFSocket,
		Await: func(ctx context.Context) ([]kubevirt.Interface, error) {
			vfs, err := process.Await(ctx)
			var out []kubevirt.Interface
			for _, v := range vfs {
				out = append(out, kubevirt.Interface{Name: v.Name, Slot: v.Slot, VFAddress: v.VF, MAC: v.MAC})
			}
			return out, err
		},
		NetworkInfo: hook.NetworkInfo, Shutdown: shutdown, Log: slog.Default().With("part", "hook"),
	})
	if err != nil {
		return err
	}
	l, err := hook.Listen(dir)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return process.Run(ctx) })
	g.Go(func() error { return server.Serve(ctx, l) })
	return g.Wait()
}

// readyCommand is the sidecar's readiness probe: the kubelet's own gRPC probe
// reaches TCP ports only.
func readyCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "ready",
		Short: "Tell by the exit status whether the VM's device process is ready (readiness probe of the sidecar)",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return device.Ready(cmd.Context(), dir) },
	}
	c.Flags().StringVar(&dir, "dir", kubevirt.SidecarDeviceDir(), "directory of the device process's sockets")
	return c
}
