// KubeVirt's own callers of hooks. The first is that of node hooks, as virt-handler 1.9 has it: its gRPC
// client, its evaluation of conditions and its order of hooks. Tests run it to
// see that CompSC's agent and Plugin object fit.
//
// Usage: kubevirt-hooks PLUGIN.yaml SOCKET
//
//	kubevirt-hooks sidecar DIRECTORY [PLUGIN.yaml]
//
// The Plugin object's hooks are called at SOCKET instead of where it says. Each
// line on standard input is a call, {"hookPoint", "node", "vmi"}; each is answered
// by a line {"error"} with what virt-handler would report, empty for nothing.
//
// The second form is virt-launcher's caller of sidecars, whose sockets it looks for
// below the DIRECTORY. With a Plugin object, which is checked as KubeVirt admits it, it goes
// on with that one's domain hooks, whose sockets are below DIRECTORY-plugin. Calls are {"call", "domain", "vmi"}, where "call" is Collect,
// OnDefineDomain or Shutdown; answers {"error", "domain"}.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"k8s.io/client-go/tools/cache"
	virtv1 "kubevirt.io/api/core/v1"
	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/hack/kubevirt-hooks/plugins"
	"compsc.io/compsc/hack/kubevirt-hooks/virtconfig"
)

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 3 && args[0] == "sidecar":
		err = sidecars(args[1], args[2], os.Stdin, os.Stdout)
	case len(args) == 2 && args[0] == "sidecar":
		err = sidecars(args[1], "", os.Stdin, os.Stdout)
	case len(args) == 2:
		err = run(args[0], args[1], os.Stdin, os.Stdout)
	default:
		fmt.Fprintln(os.Stderr, "usage: kubevirt-hooks PLUGIN.yaml SOCKET | kubevirt-hooks sidecar DIRECTORY [PLUGIN.yaml]")
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kubevirt-hooks:", err)
		os.Exit(1)
	}
}

func run(file, socket string, in io.Reader, out io.Writer) error {
	plugin, err := readPlugin(file)
	if err != nil {
		return err
	}
	for i := range plugin.Spec.NodeHooks {
		plugin.Spec.NodeHooks[i].Socket = socket
	}
	store := cache.NewStore(cache.MetaNamespaceKeyFunc)
	if err := store.Add(plugin); err != nil {
		return err
	}
	manager, err := plugins.NewNodeHookManager(store, &virtconfig.ClusterConfig{})
	if err != nil {
		return err
	}
	answers := json.NewEncoder(out)
	for calls := json.NewDecoder(bufio.NewReader(in)); ; {
		var call struct {
			HookPoint pluginv1alpha1.NodeHookPoint
			Node      string
			VMI       *virtv1.VirtualMachineInstance
		}
		switch err := calls.Decode(&call); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("call: %w", err)
		}
		var answer struct {
			Error string `json:"error"`
		}
		if err := manager.CallNodeHooks(call.HookPoint, call.VMI, call.Node); err != nil {
			answer.Error = err.Error()
		}
		if err := answers.Encode(answer); err != nil {
			return err
		}
	}
}

func readPlugin(file string) (*pluginv1alpha1.Plugin, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	plugin := &pluginv1alpha1.Plugin{}
	if err := yaml.UnmarshalStrict(text, plugin); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return plugin, nil
}
