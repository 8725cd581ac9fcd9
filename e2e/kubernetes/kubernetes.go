// Package kubernetes runs a whole Kubernetes on a lab: the control plane in
// the hub, and containerd, kubelet and kube-proxy on each node, every one the
// real program. A node has namespaces of its own for mounts, processes,
// network, control groups and its name, and shares the machine's kernel.
//
//	hub: etcd, kube-apiserver, kube-controller-manager, kube-scheduler
//	  bridge br0 ------ node a: br0 -- kubelet, containerd, pods behind cni0
//	            \------ node b: the same
//
// The lab's network, on which the VFs of both nodes are, is the nodes' own
// network as well. Images come from archives, there is no registry.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/e2e/cluster"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/wait"
)

const (
	// clusterCIDR holds the pods' networks, one /24 for each node.
	clusterCIDR = "10.244.0.0/16"
	// serviceCIDR holds the services' addresses, apiService that of the API
	// server's.
	serviceCIDR = "10.96.0.0/24"
	apiService  = "10.96.0.1"

	apiTimeout  = 3 * time.Minute
	nodeTimeout = 5 * time.Minute
	stopGrace   = 10 * time.Second
)

// Options say what to run.
type Options struct {
	// ControlPlane is the directory of etcd, kube-apiserver and kubectl,
	// Programs that of the other programs of Kubernetes.
	ControlPlane, Programs string
	// Tree is the root directory of a node, with containerd, runc and CNI
	// plugins. It is only read.
	Tree string
	// Store is a root directory of containerd's with images that every node has
	// from the start. It is only read.
	Store string
	// Images are archives of further images, which every node imports.
	Images []string
	// Progress, if set, is told what is about to be done.
	Progress func(string)
}

// Cluster is a running Kubernetes. Its methods are safe for concurrent use.
type Cluster struct {
	// Client acts with all rights. It does not cache.
	Client client.WithWatch
	// Config is its configuration.
	Config *rest.Config
	// Kubeconfig is a file for kubectl, with all rights.
	Kubeconfig string

	o     Options
	lab   *lab.Lab
	names []string // of the nodes, sorted
	creds *credentials
	procs []*lab.Process // in the order of their starts
	nodes map[string]*lab.Process
}

// Start brings up the control plane and makes every node of the lab one of
// Kubernetes, and waits until they are ready. The caller must Close it before
// the lab.
func Start(ctx context.Context, l *lab.Lab, o Options) (_ *Cluster, err error) {
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	c := &Cluster{o: o, lab: l, nodes: map[string]*lab.Process{}}
	for name := range l.Nodes {
		c.names = append(c.names, name)
	}
	slices.Sort(c.names)
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if c.creds, err = newCredentials(filepath.Join(l.Dir, "kubernetes"), l); err != nil {
		return nil, err
	}
	if err := c.routePods(); err != nil {
		return nil, fmt.Errorf("routes to pods: %w", err)
	}
	// Nodes take longer to come up than the control plane, and do without it
	// at first.
	o.Progress("nodes: containerd, kubelet, kube-proxy; images are imported")
	for i, name := range c.names {
		if err := c.startNode(i, name); err != nil {
			return nil, fmt.Errorf("node %s: %w", name, err)
		}
	}
	o.Progress("control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler")
	if err := c.startControlPlane(ctx); err != nil {
		return nil, err
	}
	return c, c.awaitNodes(ctx)
}

// Close stops everything. What ran on the nodes ends with them.
func (c *Cluster) Close() error {
	for _, p := range c.nodes {
		p.Stop(0)
	}
	for _, p := range slices.Backward(c.procs) {
		p.Stop(stopGrace)
	}
	return nil
}

// connect makes the clients.
func (c *Cluster) connect() (err error) {
	c.Kubeconfig = c.creds.admin
	if c.Config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig); err != nil {
		return err
	}
	// The tests' own haste is not what is tested.
	c.Config.QPS, c.Config.Burst = 100, 200
	// Nor are the API server's opinions of KubeVirt's manifests.
	c.Config.WarningHandler = rest.NoWarnings{}
	c.Client, err = client.NewWithWatch(c.Config, client.Options{Scheme: cluster.Scheme()})
	return err
}

// podCIDR is the network of the pods of the i-th node.
func podCIDR(i int) string { return fmt.Sprintf("10.244.%d.0/24", i+1) }

// routePods tells the hub and every node where the pods of the nodes are.
func (c *Cluster) routePods() error {
	for i, name := range c.names {
		_, pods, err := net.ParseCIDR(podCIDR(i))
		if err != nil {
			return err
		}
		route := netlink.Route{Dst: pods, Gw: c.lab.Nodes[name].IP.AsSlice()}
		places := []*lab.NS{c.lab.Hub}
		for _, other := range c.names {
			if other != name {
				places = append(places, c.lab.Nodes[other].NS)
			}
		}
		for _, ns := range places {
			if err := ns.Do(func() error { return netlink.RouteAdd(&route) }); err != nil {
				return fmt.Errorf("%s: %w", ns.Name, err)
			}
		}
	}
	// Kubernetes' own addresses are reached by translation before routing,
	// which needs a route of some kind.
	for _, name := range c.names {
		route := netlink.Route{Gw: c.lab.HubIP().AsSlice()}
		if err := c.lab.Nodes[name].NS.Do(func() error { return netlink.RouteAdd(&route) }); err != nil {
			return fmt.Errorf("%s: default route: %w", name, err)
		}
	}
	return nil
}

// awaitNodes waits until every node is ready, or one has ended.
func (c *Cluster) awaitNodes(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, nodeTimeout, errors.New("the nodes took too long"))
	defer cancel()
	return wait.Until(ctx, "the nodes to be ready", func(ctx context.Context) (bool, error) {
		if err := c.ended(); err != nil {
			return false, err
		}
		nodes := &corev1.NodeList{}
		if err := c.Client.List(ctx, nodes); err != nil {
			return false, err
		}
		ready := 0
		for _, n := range nodes.Items {
			for _, cond := range n.Status.Conditions {
				if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue {
					ready++
				}
			}
		}
		return ready == len(c.names), nil
	})
}

// ended is an error if one of the cluster's processes has ended.
func (c *Cluster) ended() error {
	for name, p := range c.nodes {
		select {
		case <-p.Done():
			return fmt.Errorf("node %s ended: %w: %s", name, p.Err(), p.Tail(2000))
		default:
		}
	}
	for _, p := range c.procs {
		select {
		case <-p.Done():
			return fmt.Errorf("%w: %s", p.Err(), p.Tail(2000))
		default:
		}
	}
	return nil
}

// LogDir is where the programs of the control plane log.
func (c *Cluster) LogDir() string { return filepath.Join(c.lab.Dir, "log") }

func (c *Cluster) stateDir(node string) string {
	return filepath.Join(c.lab.Dir, "nodes", node)
}

// linkImages puts the archives into one directory, without copying where
// that is possible.
func (c *Cluster) linkImages(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for i, image := range c.o.Images {
		to := filepath.Join(dir, fmt.Sprintf("%02d-%s", i, filepath.Base(image)))
		if err := os.Link(image, to); err != nil {
			if err := copyFile(image, to); err != nil {
				return err
			}
		}
	}
	return nil
}

func copyFile(from, to string) error {
	b, err := os.Open(from)
	if err != nil {
		return err
	}
	defer b.Close()
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = f.ReadFrom(b)
	return errors.Join(err, f.Close())
}
