// Package kubectl is the kubectl plugin "kubectl vfmigration": what a user does
// with VFMigrations, as a person reads it in a terminal.
package kubectl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/utils/clock"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/agent/kubevirt"
	kubecluster "compsc.io/compsc/agent/kubevirt/cluster"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/controllers"
)

// The names by which kubectl calls its plugins: the program, and what
// completes its command line.
const (
	pluginName   = "kubectl-vfmigration"
	completeName = "kubectl_complete-vfmigration"
)

// plugin is the kubectl plugin: what a user does with VFMigrations.
type plugin struct {
	// connect returns a client and the namespace to work in. It is called
	// once a command runs, so that help needs no cluster.
	connect func() (client.Client, string, error)
	clock   clock.PassiveClock
	// poll is how often a migration that is waited for is looked at.
	poll time.Duration

	output          string
	systemNamespace string
}

// Plugin returns the command that the program is under the name by which kubectl
// calls it, with the arguments that follow; nil under any other name.
func Plugin(argv []string, version string) *cobra.Command {
	if len(argv) == 0 {
		return nil
	}
	name, args := filepath.Base(argv[0]), argv[1:]
	if name != pluginName && name != completeName {
		return nil
	}
	c := Command()
	c.Version = version
	c.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl vfmigration"}
	c.SilenceErrors, c.SilenceUsage = true, true
	if name == completeName {
		args = append([]string{cobra.ShellCompRequestCmd}, args...)
	}
	c.SetArgs(args)
	return c
}

// Command returns the plugin as a subcommand. It reaches the cluster as kubectl
// does.
func Command() *cobra.Command {
	p := &plugin{clock: clock.RealClock{}, poll: 300 * time.Millisecond}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	overrides := &clientcmd.ConfigOverrides{}
	p.connect = func() (client.Client, string, error) {
		config := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides)
		rest, err := config.ClientConfig()
		if err != nil {
			return nil, "", fmt.Errorf("kubeconfig: %w", err)
		}
		namespace, _, err := config.Namespace()
		if err != nil {
			return nil, "", fmt.Errorf("kubeconfig: %w", err)
		}
		scheme := runtime.NewScheme()
		if err := errors.Join(clientgoscheme.AddToScheme(scheme), kubecluster.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
			return nil, "", err
		}
		c, err := client.New(rest, client.Options{Scheme: scheme})
		return c, namespace, err
	}
	c := p.command()
	f := c.PersistentFlags()
	f.StringVar(&rules.ExplicitPath, "kubeconfig", "", "file that reaches the cluster; default: as kubectl's")
	f.StringVar(&overrides.CurrentContext, "context", "", "context of that file")
	f.StringVarP(&overrides.Context.Namespace, "namespace", "n", "", "namespace of the VM; default: the context's")
	return c
}

func (p *plugin) command() *cobra.Command {
	c := &cobra.Command{
		Use:   "kubectl",
		Short: "Preflight, start, watch and abort migrations (also as the kubectl plugin " + pluginName + ")",
		Long: "Preflight, start, watch and abort migrations of VMs with VFs.\n\n" +
			"As a kubectl plugin: link the program to " + pluginName + ", and for completion to " + completeName + ", in a directory of PATH.",
		PersistentPreRunE: func(*cobra.Command, []string) error {
			ctrl.SetLogger(logr.Discard())
			if !slices.Contains([]string{"", "json", "yaml"}, p.output) {
				return fmt.Errorf("--output: %q is neither json nor yaml", p.output)
			}
			return nil
		},
	}
	f := c.PersistentFlags()
	f.StringVarP(&p.output, "output", "o", "", "json or yaml: print the object instead")
	f.StringVar(&p.systemNamespace, "system-namespace", v1alpha1.SystemNamespace, "namespace that CompSC is installed in")
	c.AddCommand(p.preflightCommand(), p.migrateCommand(), p.statusCommand(), p.abortCommand())
	return c
}

// targetFlags adds the flags that restrict the target.
func targetFlags(c *cobra.Command) func() *v1alpha1.VFMigrationTarget {
	var node string
	var labels map[string]string
	c.Flags().StringVar(&node, "to-node", "", "the node to move to")
	c.Flags().StringToStringVar(&labels, "to-nodes-with", nil, "labels that the target node must carry, such as zone=b")
	c.MarkFlagsMutuallyExclusive("to-node", "to-nodes-with")
	return func() *v1alpha1.VFMigrationTarget {
		if node == "" && len(labels) == 0 {
			return nil
		}
		return &v1alpha1.VFMigrationTarget{NodeName: node, NodeSelector: labels}
	}
}

func (p *plugin) preflightCommand() *cobra.Command {
	c := &cobra.Command{
		Use:               "preflight VMI",
		Short:             "Tell whether a VM could be moved now, and if not, why; nothing is changed",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: p.completeVMIs,
	}
	target := targetFlags(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		cl, namespace, err := p.connect()
		if err != nil {
			return err
		}
		m := &v1alpha1.VFMigration{Spec: v1alpha1.VFMigrationSpec{VMIName: args[0], Target: target()}}
		m.Namespace = namespace
		v, err := controllers.Preflight(cmd.Context(), cl, p.clock, p.systemNamespace, m)
		if err != nil {
			return fmt.Errorf("it cannot be told: %w", err)
		}
		out := cmd.OutOrStdout()
		if p.output != "" {
			if err := p.print(out, v); err != nil {
				return err
			}
		} else if v.Accepted {
			fmt.Fprintf(out, "VM %s/%s can be moved away from node %s.%s\n", namespace, args[0], v.SourceNode, v.Message)
		}
		if !v.Accepted {
			return fmt.Errorf("VM %s/%s cannot be moved: %s: %s", namespace, args[0], v.Reason, v.Message)
		}
		return nil
	}
	return c
}

func (p *plugin) migrateCommand() *cobra.Command {
	var name string
	var wait bool
	var timeout time.Duration
	c := &cobra.Command{
		Use:               "migrate VMI",
		Short:             "Start a migration of a VM with its VFs",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: p.completeVMIs,
	}
	target := targetFlags(c)
	c.Flags().StringVar(&name, "name", "", "name of the VFMigration; default: the VM's and a random suffix")
	c.Flags().BoolVar(&wait, "wait", false, "wait for its end, and show how it goes")
	c.Flags().DurationVar(&timeout, "timeout", 25*time.Minute, "how long to wait")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		cl, namespace, err := p.connect()
		if err != nil {
			return err
		}
		m := &v1alpha1.VFMigration{Spec: v1alpha1.VFMigrationSpec{VMIName: args[0], Target: target()}}
		m.Namespace, m.Name = namespace, name
		if name == "" {
			m.GenerateName = args[0][:min(len(args[0]), 240)] + "-"
		}
		if err := cl.Create(cmd.Context(), m); err != nil {
			return fmt.Errorf("create VFMigration: %w", err)
		}
		if !wait {
			if p.output != "" {
				return p.print(cmd.OutOrStdout(), m)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "vfmigration.compsc.io/%s created\n", m.Name)
			return nil
		}
		return p.follow(cmd, cl, m, timeout)
	}
	return c
}

func (p *plugin) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "status VFMIGRATION",
		Short:             "Show a migration's timeline, and what it cost",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: p.completeMigrations,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, namespace, err := p.connect()
			if err != nil {
				return err
			}
			m, err := get(cmd.Context(), cl, namespace, args[0])
			if err != nil {
				return err
			}
			return p.show(cmd.OutOrStdout(), m)
		},
	}
}

func (p *plugin) abortCommand() *cobra.Command {
	var wait bool
	var timeout time.Duration
	c := &cobra.Command{
		Use:               "abort VFMIGRATION",
		Short:             "Undo a migration, up to its point of no return",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: p.completeMigrations,
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait for its end")
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		cl, namespace, err := p.connect()
		if err != nil {
			return err
		}
		m, err := get(cmd.Context(), cl, namespace, args[0])
		if err != nil {
			return err
		}
		if ended(m) {
			return fmt.Errorf("VFMigration %s/%s has ended already: %s", namespace, m.Name, m.Status.Phase)
		}
		base := m.DeepCopy()
		m.Spec.Abort = true
		if err := cl.Patch(cmd.Context(), m, client.MergeFrom(base)); err != nil {
			return fmt.Errorf("abort VFMigration %s/%s: %w", namespace, m.Name, err)
		}
		if !wait {
			if p.output != "" {
				return p.print(cmd.OutOrStdout(), m)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "vfmigration.compsc.io/%s is to be undone\n", m.Name)
			return nil
		}
		err = p.follow(cmd, cl, m, timeout)
		if f := m.Status.Failure; f != nil && f.Reason == v1alpha1.ReasonAborted && m.Status.Phase == v1alpha1.PhaseFailed &&
			!strings.Contains(summary(m).Message, "Not undone:") {
			return nil // as it was wished
		}
		return err
	}
	return c
}

func get(ctx context.Context, c client.Client, namespace, name string) (*v1alpha1.VFMigration, error) {
	m := &v1alpha1.VFMigration{}
	if err := c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, m); err != nil {
		return nil, fmt.Errorf("VFMigration %s/%s: %w", namespace, name, err)
	}
	return m, nil
}

// print prints an object in the form that was asked for.
func (p *plugin) print(w io.Writer, obj any) error {
	if m, ok := obj.(*v1alpha1.VFMigration); ok {
		m = m.DeepCopy()
		m.APIVersion, m.Kind, m.ManagedFields = v1alpha1.GroupVersion.String(), "VFMigration", nil
		obj = m
	}
	text, err := yaml.Marshal(obj)
	if err == nil && p.output == "json" {
		text, err = yaml.YAMLToJSON(text)
		text = append(text, '\n')
	}
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	return err
}

func (p *plugin) completeVMIs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	list := &virtv1.VirtualMachineInstanceList{}
	if !p.list(cmd, args, list) {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	for i := range list.Items {
		if len(kubevirt.BoundInterfaces(&list.Items[i])) > 0 {
			names = append(names, list.Items[i].Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (p *plugin) completeMigrations(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	list := &v1alpha1.VFMigrationList{}
	if !p.list(cmd, args, list) {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	for i := range list.Items {
		if m := &list.Items[i]; cmd.Name() != "abort" || !ended(m) {
			names = append(names, m.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// list lists for a completion, which offers nothing where it cannot.
func (p *plugin) list(cmd *cobra.Command, args []string, list client.ObjectList) bool {
	if len(args) > 0 {
		return false
	}
	cl, namespace, err := p.connect()
	if err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 3*time.Second)
	defer cancel()
	return cl.List(ctx, list, client.InNamespace(namespace)) == nil
}

// columns is the width of w if that is a terminal on which a line can be
// overwritten, else 0.
func columns(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return 0
	}
	width, _, err := term.GetSize(int(f.Fd()))
	switch {
	case err != nil:
		return 0
	case width == 0: // as of a serial line
		return 80
	}
	return width
}
