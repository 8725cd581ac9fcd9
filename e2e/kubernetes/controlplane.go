package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/wait"
)

const (
	apiPort = "6443"
	// etcd listens on the hub's loopback interface, which no other lab sees.
	etcdURL     = "http://127.0.0.1:2379"
	etcdPeerURL = "http://127.0.0.1:2380"
)

func (c *Cluster) startControlPlane(ctx context.Context) error {
	dir, k := c.creds.dir, c.creds
	if err := c.run(c.o.ControlPlane, "etcd",
		"--data-dir="+filepath.Join(dir, "etcd"),
		// The data lives as long as a run: waiting for the disk buys nothing.
		"--unsafe-no-fsync",
		"--listen-client-urls="+etcdURL, "--advertise-client-urls="+etcdURL,
		"--listen-peer-urls="+etcdPeerURL, "--initial-advertise-peer-urls="+etcdPeerURL,
		"--initial-cluster=default="+etcdPeerURL); err != nil {
		return err
	}
	if err := c.run(c.o.ControlPlane, "kube-apiserver",
		"--etcd-servers="+etcdURL,
		"--bind-address="+c.lab.HubIP().String(), "--advertise-address="+c.lab.HubIP().String(), "--secure-port="+apiPort,
		"--tls-cert-file="+k.api.Cert, "--tls-private-key-file="+k.api.Key, "--client-ca-file="+k.api.CA,
		"--cert-dir="+filepath.Join(dir, "apiserver"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+k.serviceAccounts, "--service-account-signing-key-file="+k.serviceAccounts,
		"--service-cluster-ip-range="+serviceCIDR,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		"--requestheader-client-ca-file="+k.proxy.CA, "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file="+k.proxy.Cert, "--proxy-client-key-file="+k.proxy.Key,
		// There is no kube-proxy here: services' pods are asked themselves.
		"--enable-aggregator-routing=true",
		"--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate="+k.kubelet.Cert, "--kubelet-client-key="+k.kubelet.Key); err != nil {
		return err
	}
	if err := c.connect(); err != nil {
		return err
	}
	if err := c.awaitAPI(ctx); err != nil {
		return err
	}
	if err := c.run(c.o.Programs, "kube-controller-manager",
		"--kubeconfig="+k.controller, "--authentication-kubeconfig="+k.controller, "--authorization-kubeconfig="+k.controller,
		"--service-account-private-key-file="+k.serviceAccounts, "--root-ca-file="+k.api.CA,
		"--use-service-account-credentials=true", "--leader-elect=false",
		"--bind-address=127.0.0.1", "--cert-dir="+filepath.Join(dir, "controller-manager")); err != nil {
		return err
	}
	return c.run(c.o.Programs, "kube-scheduler",
		"--kubeconfig="+k.scheduler, "--authentication-kubeconfig="+k.scheduler, "--authorization-kubeconfig="+k.scheduler,
		"--leader-elect=false", "--bind-address=127.0.0.1", "--cert-dir="+filepath.Join(dir, "scheduler"))
}

// run starts a program of the control plane in the hub.
func (c *Cluster) run(dir, name string, args ...string) error {
	p, err := c.lab.Start(lab.Command{
		Name: name, Path: filepath.Join(dir, name), Args: args, NS: c.lab.Hub, Log: filepath.Join(c.LogDir(), name+".log"),
	})
	if err != nil {
		return err
	}
	c.procs = append(c.procs, p)
	return nil
}

func (c *Cluster) awaitAPI(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, apiTimeout, errors.New("the API server took too long"))
	defer cancel()
	var last error
	err := wait.Until(ctx, "the API server", func(ctx context.Context) (bool, error) {
		if err := c.ended(); err != nil {
			return false, err
		}
		_, last = c.get(ctx, "/readyz")
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("%w; the last answer: %w", err, last)
	}
	return nil
}
