package main

import (
	"encoding/json"
	"errors"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// netConf is the part of the SR-IOV CNI plugin's configuration that is heeded.
type netConf struct {
	types.NetConf
	// DeviceID is the VF's PCI address, which Multus fills in.
	DeviceID string `json:"deviceID"`
}

func cni() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: nothing, Check: nothing}, version.All,
		"stand-in for the SR-IOV CNI plugin, for modelled VFs")
}

// add reports an interface of the pod that there is not, as the SR-IOV CNI
// plugin does for a VF that belongs to vfio-pci.
func add(args *skel.CmdArgs) error {
	r, version, err := result(args)
	if err != nil {
		return err
	}
	return types.PrintResult(r, version)
}

func result(args *skel.CmdArgs) (types.Result, string, error) {
	var c netConf
	if err := json.Unmarshal(args.StdinData, &c); err != nil {
		return nil, "", err
	}
	if c.DeviceID == "" {
		return nil, "", errors.New("no deviceID: the network names no resource of VFs, or the pod was given none")
	}
	return &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{{Name: args.IfName, Sandbox: args.Netns}},
	}, c.CNIVersion, nil
}

func nothing(*skel.CmdArgs) error { return nil }
