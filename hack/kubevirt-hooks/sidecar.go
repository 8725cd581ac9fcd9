package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"time"

	virtv1 "kubevirt.io/api/core/v1"

	api "compsc.io/compsc/hack/kubevirt-hooks/domainapi"
	"compsc.io/compsc/hack/kubevirt-hooks/hooks"
)

// collectTimeout is how long a sidecar's socket is looked for; virt-launcher
// itself takes 10 s.
const collectTimeout = 5 * time.Second

// sidecars calls the sidecars whose sockets are in the directories below dir, as
// virt-launcher does.
func sidecars(dir string, in io.Reader, out io.Writer) error {
	manager := hooks.NewManager(dir)
	answers := json.NewEncoder(out)
	for calls := json.NewDecoder(in); ; {
		var call struct {
			Call   string
			Domain string
			VMI    *virtv1.VirtualMachineInstance
		}
		switch err := calls.Decode(&call); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("call: %w", err)
		}
		var answer struct {
			Error  string `json:"error"`
			Domain string `json:"domain"`
		}
		var err error
		switch call.Call {
		case "Collect":
			err = manager.Collect(1, collectTimeout)
		case "OnDefineDomain":
			spec := &api.DomainSpec{}
			if err = xml.Unmarshal([]byte(call.Domain), spec); err == nil {
				answer.Domain, err = manager.OnDefineDomain(spec, call.VMI)
			}
		case "Shutdown":
			err = manager.Shutdown()
		default:
			return fmt.Errorf("call: there is no %q", call.Call)
		}
		if err != nil {
			answer.Error = err.Error()
		}
		if err := answers.Encode(answer); err != nil {
			return err
		}
	}
}
