// Package nodes makes machines of a lab's nodes: VMs with emulated SR-IOV cards
// (package node), whose wires are joined by the lab's network, on which the nodes
// have their addresses too. Agents and pods run in them, started from outside
// (package remote).
package nodes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/remote"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/job"
	"compsc.io/compsc/e2e/sriov/kubelet"
	"compsc.io/compsc/e2e/sriov/node"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

const (
	// resource is what the nodes' device plugin calls the VFs.
	resource = "compsc.io/vf"
	// memory of a node is in MiB; hugePages, a part of it, is for its VM.
	memory, hugePages = 1280, 128
	// slow is about how many times longer things take in a node.
	slow = 10

	bootTimeout = 4 * time.Minute
	endTimeout  = time.Minute
)

// Options say what nodes are made of.
type Options struct {
	// Node is what the VMs boot.
	Node artifacts.Node
	// Compsc is the product's binary, Member that of e2e/sriov/member.
	Compsc, Member string
	// KVM is a QEMU program to run the VMs with, whose emulated processors KVM can
	// use.
	KVM string
	// Kernel and Initrd are what the guests in the nodes boot.
	Kernel, Initrd string
	// VFs is how many each node's card has.
	VFs int
}

// Nodes are running nodes.
type Nodes struct {
	o     Options
	lab   *lab.Lab
	nodes map[string]*machine
	kill  context.CancelFunc
}

// machine is one node.
type machine struct {
	address string // of its server
	ended   chan struct{}
	err     error // valid once ended is closed
}

// Start makes machines of all nodes of the lab, and returns when all serve.
func Start(ctx context.Context, l *lab.Lab, o Options) (_ *Nodes, err error) {
	life, kill := context.WithCancel(context.WithoutCancel(ctx))
	n := &Nodes{o: o, lab: l, nodes: map[string]*machine{}, kill: kill}
	defer func() {
		if err != nil {
			kill()
			n.await()
		}
	}()
	var names []string
	for name := range l.Nodes {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		if err := n.boot(life, name, i); err != nil {
			return nil, fmt.Errorf("node %s: %w", name, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	for _, name := range names {
		if err := wait.Until(ctx, "node "+name+" to serve", func(context.Context) (bool, error) {
			m := n.nodes[name]
			select {
			case <-m.ended:
				return false, errors.Join(errors.New("it ended"), m.err)
			default:
			}
			return n.Copy(name) == nil, nil
		}); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// boot starts a node.
func (n *Nodes) boot(ctx context.Context, name string, number int) error {
	wire, address, err := n.lab.Plug(name)
	if err != nil {
		return err
	}
	defer wire.Close()
	logs := filepath.Join(n.lab.Dir, "log")
	if err := os.MkdirAll(logs, 0o700); err != nil {
		return err
	}
	output, err := os.Create(filepath.Join(logs, "node-"+name+".log"))
	if err != nil {
		return err
	}
	vm, err := node.Start(ctx, node.Config{
		QEMU: n.o.Node.QEMU, KVM: n.o.KVM, Kernel: n.o.Node.Kernel, Initrd: n.o.Node.Initrd,
		Memory: memory, HugePages: hugePages, Number: number, Wire: wire,
		Files: map[string]string{"compsc": n.o.Compsc, "member": n.o.Member, "kernel": n.o.Kernel, "initrd": n.o.Initrd},
		Job: job.Job{
			Args: []string{filepath.Join(job.Dir, "member"), "serve", node.WireMACOf(number), address.String(), strconv.Itoa(n.o.VFs)},
			Env:  []string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp"}, Dir: job.Dir,
		},
		Output: output, Console: filepath.Join(logs, "node-"+name+"-console.log"),
	})
	if err != nil {
		return errors.Join(err, output.Close())
	}
	m := &machine{address: netip.AddrPortFrom(address.Addr(), remote.Port).String(), ended: make(chan struct{})}
	n.nodes[name] = m
	go func() {
		status, err := vm.Wait()
		if err == nil {
			err = status.Err()
		}
		m.err = errors.Join(err, output.Close())
		close(m.ended)
	}()
	return nil
}

func (n *Nodes) await() {
	for _, m := range n.nodes {
		<-m.ended
	}
}

// Close ends the nodes, and tells of accesses that their IOMMUs refused.
func (n *Nodes) Close() error {
	var errs []error
	for _, m := range n.nodes {
		errs = append(errs, remote.Quit(m.address))
	}
	late := time.AfterFunc(endTimeout, n.kill)
	n.await()
	late.Stop()
	n.kill()
	for name, m := range n.nodes {
		if m.err != nil {
			errs = append(errs, fmt.Errorf("node %s: %w", name, m.err))
		}
	}
	return errors.Join(errs...)
}

// Start starts a process on a node, and returns the one of this machine that
// stands for it.
func (n *Nodes) Start(node string, c lab.Command, dirs ...string) (*lab.Process, error) {
	log := c.Log
	c.Log = ""
	encoded, err := json.Marshal(remote.Process{Command: c, Dirs: dirs})
	if err != nil {
		return nil, err
	}
	return n.lab.Start(lab.Command{
		Name: c.Name, Path: n.o.Member, Args: []string{"run", n.nodes[node].address, string(encoded)}, Log: log,
	})
}

// Forward makes a socket of the node appear at the same path of this machine.
func (n *Nodes) Forward(ctx context.Context, node, path string) error {
	return remote.Forward(ctx, n.nodes[node].address, path)
}

// Copy copies files to a node.
func (n *Nodes) Copy(node string, files ...string) error {
	p := &remote.Process{Files: map[string][]byte{}}
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		p.Files[f] = content
	}
	return remote.Run(n.nodes[node].address, p, io.Discard)
}

// Compsc is the product's binary on the nodes.
func (n *Nodes) Compsc() string { return filepath.Join(job.Dir, "compsc") }

// Configure says what of the stand-in's configuration the nodes have for
// themselves.
func (n *Nodes) Configure(c *standin.Config) {
	c.Compsc = n.Compsc
	c.QEMUTree = job.TreeDir
	c.Kernel, c.Initrd = filepath.Join(job.Dir, "kernel"), filepath.Join(job.Dir, "initrd")
	c.KVM, c.Slow = true, slow
}

// Look returns how the node is, as its kernel has it.
func (n *Nodes) Look(node string) (is card.Node, err error) {
	var out bytes.Buffer
	p := &remote.Process{Command: lab.Command{Name: "look", Path: filepath.Join(job.Dir, "member"), Args: []string{"look"}}}
	if err := remote.Run(n.nodes[node].address, p, &out); err != nil {
		return is, fmt.Errorf("node %s: %w: %s", node, err, out.Bytes())
	}
	return is, json.Unmarshal(out.Bytes(), &is)
}

// Allocated tells the node which of its VFs its pods have.
func (n *Nodes) Allocated(node string, pods []standin.Allocation) error {
	var list []kubelet.Pod
	for _, p := range pods {
		list = append(list, kubelet.Pod{Namespace: p.Namespace, Name: p.Pod, Container: p.Container, Resource: resource, Devices: p.VFs})
	}
	content, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return remote.Run(n.nodes[node].address, &remote.Process{Files: map[string][]byte{kubelet.File: content}}, io.Discard)
}
