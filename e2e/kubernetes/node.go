package kubernetes

import (
	"context"
	_ "embed"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"io"

	"k8s.io/client-go/rest"

	"compsc.io/compsc/e2e/lab"
)

//go:embed node.sh
var nodeScript []byte

// enter puts a process into control groups before it makes the node's
// namespaces, so that these groups are the roots of what the node sees.
const enter = `set -eu
for dir in $CGROUPS; do echo $$ >"$dir/cgroup.procs"; done
exec unshare --mount --uts --ipc --pid --cgroup --fork --kill-child bash "$0"
`

// kubeletConfig is the kubelet's configuration on every node.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: /etc/kubernetes/ca.crt}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
# The machine may still have the first version of control groups.
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
resolvConf: /etc/resolv.conf
clusterDNS: []
# The disk is the machine's, and not this node's to keep free. Images cannot be
# had again.
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
protectKernelDefaults: true
makeIPTablesUtilChains: false
`

func (c *Cluster) startNode(i int, name string) error {
	state := c.stateDir(name)
	etc := filepath.Join(state, "etc") // the node's /etc/kubernetes
	if err := os.MkdirAll(etc, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(etc, "kubelet.yaml"), []byte(kubeletConfig), 0o600); err != nil {
		return err
	}
	ca, err := os.ReadFile(c.creds.api.CA)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(etc, "ca.crt"), ca, 0o600); err != nil {
		return err
	}
	for _, u := range []struct{ file, user, group string }{
		{"kubelet", "system:node:" + name, "system:nodes"},
		{"kube-proxy", "system:kube-proxy", ""},
	} {
		path, err := c.creds.kubeconfig(etc, u.user, u.group)
		if err != nil {
			return err
		}
		if err := os.Rename(path, filepath.Join(etc, u.file+".kubeconfig")); err != nil {
			return err
		}
	}
	images := filepath.Join(state, "images")
	if err := c.linkImages(images); err != nil {
		return err
	}
	script := filepath.Join(state, "node.sh")
	if err := os.WriteFile(script, nodeScript, 0o700); err != nil {
		return err
	}
	cgroups, err := c.lab.NewCgroup(name)
	if err != nil {
		return err
	}
	node := c.lab.Nodes[name]
	p, err := c.lab.Start(lab.Command{
		Name: "node " + name, Path: "/bin/bash", Args: []string{"-c", enter, script}, NS: node.NS,
		Env: append(os.Environ(), "CGROUPS="+strings.Join(cgroups, " "),
			"NODE="+name, "NODE_IP="+node.IP.String(), "POD_CIDR="+podCIDR(i), "CLUSTER_CIDR="+clusterCIDR,
			"STATE="+state, "TREE="+c.o.Tree, "PROGRAMS="+c.o.Programs, "STORE="+c.o.Store, "IMAGES="+images),
		Log: filepath.Join(c.LogDir(), "node-"+name+".log"),
	})
	if err != nil {
		return err
	}
	c.nodes[name] = p
	return nil
}

// get asks the API server for a path.
func (c *Cluster) get(ctx context.Context, path string) (string, error) {
	t, err := rest.HTTPClientFor(c.Config)
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.Config.Host+path, nil)
	if err != nil {
		return "", err
	}
	response, err := t.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", response.Status, b)
	}
	return string(b), err
}
