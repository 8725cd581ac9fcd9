package kubevirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/traffic"
)

// moveTimeout bounds a migration from its creation to its end.
const moveTimeout = 4 * time.Minute

// Kubectl runs kubectl with all rights, with stdin as its input, and returns
// what it prints.
func (s *Stack) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.o.Artifacts.ControlPlane, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kube.Kubeconfig)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// vmim is what a user writes to move a virtual machine with KubeVirt alone.
const vmim = `apiVersion: kubevirt.io/v1
kind: VirtualMachineInstanceMigration
metadata:
  name: %s
  namespace: ` + Namespace + `
spec:
  vmiName: %s
`

// CreateVMIM creates KubeVirt's migration of the virtual machine with kubectl.
func (s *Stack) CreateVMIM(ctx context.Context, name, vmi string) error {
	return s.createVMIM(ctx, fmt.Sprintf(vmim, name, vmi))
}

// CreateVMIMTo is CreateVMIM for a node.
func (s *Stack) CreateVMIMTo(ctx context.Context, name, vmi, node string) error {
	return s.createVMIM(ctx, fmt.Sprintf(vmim+"  addedNodeSelector: {%s: %s}\n", name, vmi, corev1.LabelHostname, node))
}

func (s *Stack) createVMIM(ctx context.Context, manifest string) error {
	_, err := s.Kubectl(ctx, manifest, "create", "-f", "-")
	return err
}

// AwaitVMIM waits until KubeVirt's migration has ended, and returns it.
func (s *Stack) AwaitVMIM(ctx context.Context, name string) (*kubevirtv1.VirtualMachineInstanceMigration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, moveTimeout, errors.New("it took too long"))
	defer cancel()
	m := &kubevirtv1.VirtualMachineInstanceMigration{}
	err := s.Kube.Until(ctx, "migration "+name+" to end", func(ctx context.Context) (bool, error) {
		err := s.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: name}, m)
		return m.IsFinal(), err
	})
	if err != nil {
		return m, fmt.Errorf("%w; it is %q: %+v", err, m.Status.Phase, m.Status.Conditions)
	}
	return m, nil
}

// vfm is what a user writes to move a virtual machine with its VF.
const vfm = `apiVersion: compsc.io/v1alpha1
kind: VFMigration
metadata:
  name: %s
  namespace: ` + Namespace + `
spec:
  vmiName: %s
  target:
    nodeName: %s
`

// CreateVFMigration creates our migration of the virtual machine with kubectl.
func (s *Stack) CreateVFMigration(ctx context.Context, name, vmi, node string) error {
	_, err := s.Kubectl(ctx, fmt.Sprintf(vfm, name, vmi, node), "create", "-f", "-")
	return err
}

// AwaitVFMigration waits until the one VFMigration of the virtual machine that
// known does not name has ended, well or not, and returns it.
func (s *Stack) AwaitVFMigration(ctx context.Context, vmi string, known map[string]bool) (*v1alpha1.VFMigration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, moveTimeout, errors.New("it took too long"))
	defer cancel()
	var m *v1alpha1.VFMigration
	err := s.Kube.Until(ctx, "the VFMigration of "+vmi+" to end", func(ctx context.Context) (bool, error) {
		fresh, err := s.newMigrations(ctx, vmi, known)
		if err != nil || len(fresh) == 0 {
			return false, err
		}
		if len(fresh) > 1 {
			return false, fmt.Errorf("one migration has %d VFMigrations", len(fresh))
		}
		m = &fresh[0]
		return harness.Ended(m), nil
	})
	if err != nil && m != nil {
		err = fmt.Errorf("%w; its state: %s", err, harness.Describe(m))
	}
	return m, err
}

func (s *Stack) newMigrations(ctx context.Context, vmi string, known map[string]bool) (fresh []v1alpha1.VFMigration, err error) {
	all := &v1alpha1.VFMigrationList{}
	if err := s.Client().List(ctx, all, client.InNamespace(Namespace)); err != nil {
		return nil, err
	}
	for _, m := range all.Items {
		if m.Spec.VMIName == vmi && !known[m.Name] {
			fresh = append(fresh, m)
		}
	}
	return fresh, nil
}

// Known are the names of the VFMigrations that there are.
func (s *Stack) Known(ctx context.Context) (map[string]bool, error) {
	all := &v1alpha1.VFMigrationList{}
	known := map[string]bool{}
	err := s.Client().List(ctx, all, client.InNamespace(Namespace))
	for _, m := range all.Items {
		known[m.Name] = true
	}
	return known, err
}

// Move is the account of a migration under load that succeeded.
type Move struct {
	// How the migration was asked for.
	How string
	// From and To are nodes.
	From, To string
	// Took is from the request to the end of the VFMigration.
	Took time.Duration
	// VFMigration is as it ended.
	VFMigration *v1alpha1.VFMigration
	// PingsLost of those that were sent during the move, one each 10 ms.
	PingsLost int
}

// Move has the guest's virtual machine moved by ask, and checks all that must
// hold: the VFMigration succeeded, the machine runs on the other node, its
// driver was not reset, its link stayed, its stream is intact and flows.
func (s *Stack) Move(ctx context.Context, vmi string, g *traffic.Guest, how string, ask func(ctx context.Context, from, to string) error) (*Move, error) {
	from, err := s.NodeOf(ctx, vmi)
	if err != nil {
		return nil, err
	}
	known, err := s.Known(ctx)
	if err != nil {
		return nil, err
	}
	mark, start := g.Pinger.Mark(), time.Now()
	if err := ask(ctx, from, Other(from)); err != nil {
		return nil, err
	}
	m, err := s.AwaitVFMigration(ctx, vmi, known)
	if err != nil {
		return nil, err
	}
	took := time.Since(start)
	if !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) {
		return nil, fmt.Errorf("VFMigration %s failed: %s", m.Name, harness.Describe(m))
	}
	if _, err := g.CheckUndisturbed(ctx); err != nil {
		return nil, err
	}
	pings, err := g.Pinger.Report(ctx, mark)
	if err != nil {
		return nil, err
	}
	to, err := s.NodeOf(ctx, vmi)
	if err != nil {
		return nil, err
	}
	if to != Other(from) {
		return nil, fmt.Errorf("VMI %s is on %s after its move, was on %s", vmi, to, from)
	}
	return &Move{How: how, From: from, To: to, Took: took, VFMigration: m, PingsLost: pings.Lost}, nil
}

// AwaitMovable waits until all VFs of the node are free, which those that a move
// came from are only when its old pod has ended, and the manager has noticed.
func (s *Stack) AwaitMovable(ctx context.Context, vmi, to string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, moveTimeout, errors.New("it took too long"))
	defer cancel()
	return s.Kube.Until(ctx, "VMI "+vmi+" to be movable to node "+to, func(ctx context.Context) (bool, error) {
		free, err := s.FreeVFs(ctx, to)
		if err != nil || free < VFsPerNode {
			return false, err
		}
		v := &kubevirtv1.VirtualMachineInstance{}
		err = s.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: vmi}, v)
		return v.Annotations[kubevirt.AnnotationMigrationBlocked] == "", err
	})
}

// Ways are the ways to move a virtual machine that users have.
func (s *Stack) Ways(vmi string) []Way {
	return []Way{
		{"VFMigration", func(ctx context.Context, _, to string) error {
			return s.CreateVFMigration(ctx, "by-vfmigration", vmi, to)
		}},
		{"VirtualMachineInstanceMigration", func(ctx context.Context, _, _ string) error {
			return s.CreateVMIM(ctx, "by-vmim", vmi)
		}},
		{"kubectl drain", func(ctx context.Context, from, to string) error {
			// KubeVirt's evacuation controller may overlook a VM that has only just
			// come, until something of it changes.
			if err := s.AwaitMovable(ctx, vmi, to); err != nil {
				return err
			}
			return s.Drain(ctx, from, moveTimeout)
		}},
	}
}

// Drain has kubectl drain the node of virtual machines, which ends when their
// pods are gone from it or after a time, and then opens the node again.
func (s *Stack) Drain(ctx context.Context, node string, bound time.Duration) error {
	_, err := s.Kubectl(ctx, "", "drain", node, "--pod-selector=kubevirt.io=virt-launcher",
		"--delete-emptydir-data", "--ignore-daemonsets", "--timeout="+bound.String())
	_, opened := s.Kubectl(context.WithoutCancel(ctx), "", "uncordon", node)
	return errors.Join(err, opened)
}

// Way is a way to have a virtual machine moved.
type Way struct {
	Name string
	Ask  func(ctx context.Context, from, to string) error
}

// Boot starts a virtual machine with VFs, the first with the n-th guest's
// address, and waits until its driver has all links.
func (s *Stack) Boot(ctx context.Context, name string, macs []string, n int) (*traffic.Guest, error) {
	ip := s.Lab.GuestAddress(n)
	if err := s.CreateVM(ctx, name, VMOptions{MACs: macs, Address: ip.String()}); err != nil {
		return nil, err
	}
	g := &traffic.Guest{Lab: s.Lab, IP: ip.Addr(), Call: func(ctx context.Context, do func(context.Context, *proto.Client) error) error {
		return s.Guest(ctx, name, do)
	}}
	return g, s.Guest(ctx, name, func(ctx context.Context, c *proto.Client) error {
		_, err := c.WaitUp(ctx, len(macs))
		return err
	})
}

// String is the account in one line.
func (m *Move) String() string {
	s := fmt.Sprintf("%s: from %s to %s in %.1f s, %d pings lost", m.How, m.From, m.To, m.Took.Seconds(), m.PingsLost)
	if d := m.VFMigration.Status.Downtime; d != nil {
		s += fmt.Sprintf(", VF stopped for %d ms", d.DeviceStopped.Milliseconds())
	}
	return s
}
