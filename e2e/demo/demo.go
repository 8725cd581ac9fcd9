// Package demo is `compsc demo`: a real guest with the distribution's
// unmodified VF driver moves between two nodes under load, and keeps its VF.
// It is for people first; its exit status and out/demo.json are for machines.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
)

// Options of a demonstration.
type Options struct {
	// Hops is how often the VM moves, at least once.
	Hops int
	// Keep leaves everything running afterwards, until the context ends.
	Keep bool
	// Out is the directory for demo.json and the processes' logs.
	Out string
	// Stdout gets the progress and the results.
	Stdout io.Writer
}

// Result is the content of demo.json.
type Result struct {
	// Hops are the migrations, in order.
	Hops []*harness.Hop `json:"hops"`
	// Footprint is what the product's processes used.
	Footprint Footprint `json:"footprint"`
}

// Command returns the subcommand.
func Command() *cobra.Command {
	o := Options{}
	c := &cobra.Command{
		Use:   "demo",
		Short: "Move a VM with its VF between two nodes on this machine (as root, in the source tree)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Stdout = cmd.OutOrStdout()
			return Run(cmd.Context(), o)
		},
	}
	c.Flags().IntVar(&o.Hops, "hops", 1, "how often the VM moves")
	c.Flags().BoolVar(&o.Keep, "keep", false, "leave everything running until interrupted")
	c.Flags().StringVar(&o.Out, "out", "out", "directory for demo.json and the logs")
	return c
}

// show is a running demonstration.
type show struct {
	Options
	h      *harness.Harness
	vm     *harness.VM
	result Result
	start  time.Time
}

func (d *show) say(format string, a ...any) {
	fmt.Fprintf(d.Stdout, "%6.1fs  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, a...))
}

// Run shows the demonstration and removes every trace of it but o.Out, also
// when ctx ends early. An error says what did not go as it must.
func Run(ctx context.Context, o Options) (err error) {
	if o.Hops < 1 {
		return fmt.Errorf("--hops: %d, at least 1 is needed", o.Hops)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	set, err := artifacts.Find(self)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.Out, 0o755); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(o.Out, "demo.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	d := &show{Options: o, start: time.Now()}
	d.h, err = harness.Start(ctx, harness.Options{
		Artifacts: set,
		Log:       slog.New(slog.NewTextHandler(log, nil)),
		Progress:  func(s string) { d.say("%s", s) },
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = errors.Join(errors.New("interrupted"), err)
		}
		d.say("cleaning up")
		err = errors.Join(err, d.keepLogs(), d.h.Close())
	}()
	if err := d.play(ctx, set); err != nil {
		return err
	}
	if o.Keep {
		d.say("everything is left running; Ctrl-C ends it")
		<-ctx.Done()
	}
	return nil
}

func (d *show) play(ctx context.Context, set artifacts.Set) (err error) {
	d.say("booting the guest on node %s: kernel %s", harness.NodeA, filepath.Base(filepath.Dir(set.Kernel)))
	if d.vm, err = d.h.Boot(ctx); err != nil {
		return err
	}
	if err := d.introduceGuest(ctx); err != nil {
		return err
	}
	d.say("traffic: ping every 10 ms, a checked TCP stream in both directions, multicast")
	if err := d.vm.StartTraffic(ctx); err != nil {
		return err
	}
	fmt.Fprintf(d.Stdout, "\n    To watch from another terminal:\n\n        export KUBECONFIG=%s\n        kubectl get vfm -w\n\n", d.h.Cluster.AdminKubeconfig)
	node := harness.NodeA
	for i := 1; i <= d.Hops; i++ {
		node = harness.Other(node)
		if err := d.hop(ctx, set, i, node); err != nil {
			return errors.Join(fmt.Errorf("hop %d: %w", i, err), d.write())
		}
	}
	if err := d.look(ctx, set, "hop-"+strconv.Itoa(d.Hops)); err != nil {
		return err
	}
	st, err := d.vm.StopTraffic(ctx)
	if err != nil {
		return err
	}
	if !st.Intact {
		return fmt.Errorf("the stream was corrupted at offset %d", st.FirstBad)
	}
	d.say("measuring the idle processes")
	if d.result.Footprint, err = measure(ctx, d.h); err != nil {
		return err
	}
	d.table()
	if err := d.write(); err != nil {
		return err
	}
	return d.result.Footprint.check()
}

func (d *show) introduceGuest(ctx context.Context) error {
	return d.vm.Call(ctx, func(ctx context.Context, c *proto.Client) error {
		info, err := c.Info(ctx)
		if err != nil {
			return err
		}
		for _, i := range info.Interfaces {
			d.say("guest: Linux %s, %s is %s with driver %s, %s", info.Kernel, i.Name, i.PCI, i.Driver, i.MAC)
		}
		return nil
	})
}

// hop applies a VFMigration with kubectl, as a person would, and follows it.
func (d *show) hop(ctx context.Context, set artifacts.Set, i int, node string) error {
	m := harness.NewMigration("hop-"+strconv.Itoa(i), node)
	d.say("hop %d: kubectl apply of VFMigration %s, to node %s", i, m.Name, node)
	shown := map[string]string{}
	hop, err := d.vm.Hop(ctx, m, func(ctx context.Context, m *v1alpha1.VFMigration) error {
		return d.apply(ctx, set, m)
	}, func(m *v1alpha1.VFMigration) {
		for _, c := range m.Status.Conditions {
			if s := fmt.Sprintf("%s=%s %s", c.Type, c.Status, c.Reason); shown[c.Type] != s {
				shown[c.Type] = s
				d.say("    %-14s %-8s %s", c.Type, c.Status, c.Message)
			}
		}
	})
	if hop != nil {
		d.result.Hops = append(d.result.Hops, hop)
	}
	if err != nil {
		return err
	}
	d.say("hop %d: VM stopped %.1f ms, %d pings lost, stream intact", i, hop.VMStoppedMs, hop.PingsLost)
	return nil
}

// apply applies a VFMigration with kubectl.
func (d *show) apply(ctx context.Context, set artifacts.Set, m *v1alpha1.VFMigration) error {
	manifest, err := yaml.Marshal(map[string]any{
		"apiVersion": m.APIVersion, "kind": m.Kind,
		"metadata": map[string]string{"name": m.Name, "namespace": m.Namespace},
		"spec":     m.Spec,
	})
	if err != nil {
		return err
	}
	file := filepath.Join(d.h.Lab.Dir, m.Name+".yaml")
	if err := os.WriteFile(file, manifest, 0o600); err != nil {
		return err
	}
	_, err = d.kubectl(ctx, set, "apply", "-f", file)
	return err
}

// look shows what kubectl has to say of a migration that has ended.
func (d *show) look(ctx context.Context, set artifacts.Set, name string) error {
	for _, line := range []string{
		"get vfm",
		"get vfm -o wide",
		"get vfnodes",
		"wait --for=condition=Succeeded vfm/" + name,
		"describe vfm " + name,
		"vfmigration status " + name,
	} {
		out, err := d.kubectl(ctx, set, strings.Fields(line)...)
		if err != nil {
			return err
		}
		fmt.Fprintf(d.Stdout, "\n$ kubectl %s\n%s", line, out)
	}
	fmt.Fprintln(d.Stdout)
	return nil
}

// kubectl runs kubectl as the cluster's administrator, with this program as its
// plugin.
func (d *show) kubectl(ctx context.Context, set artifacts.Set, args ...string) ([]byte, error) {
	kubectl := filepath.Join(set.ControlPlane, "kubectl")
	if _, err := os.Stat(kubectl); err != nil {
		if kubectl, err = exec.LookPath("kubectl"); err != nil {
			return nil, fmt.Errorf("kubectl is neither in %s nor in PATH: %w", set.ControlPlane, err)
		}
	}
	plugin := filepath.Join(d.h.Lab.Dir, "kubectl-vfmigration")
	if err := os.Symlink(set.Compsc, plugin); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	c := exec.CommandContext(ctx, kubectl, args...)
	c.Env = append(os.Environ(), "KUBECONFIG="+d.h.Cluster.AdminKubeconfig, "PATH="+d.h.Lab.Dir+":"+os.Getenv("PATH"))
	out, err := c.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return out, nil
}

func (d *show) write() error {
	b, err := json.MarshalIndent(d.result, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.Out, "demo.json"), append(b, '\n'), 0o644)
}

// keepLogs copies the processes' logs out of the directory that is about to
// be removed.
func (d *show) keepLogs() error {
	to := filepath.Join(d.Out, "log")
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if _, err := os.Stat(d.h.LogDir()); err != nil {
		return nil // nothing was started
	}
	return os.CopyFS(to, os.DirFS(d.h.LogDir()))
}
