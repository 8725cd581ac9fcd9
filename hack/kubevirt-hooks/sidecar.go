package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	virtv1 "kubevirt.io/api/core/v1"
	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"

	api "compsc.io/compsc/hack/kubevirt-hooks/domainapi"
	cel "compsc.io/compsc/hack/kubevirt-hooks/domaincel"
	plugins "compsc.io/compsc/hack/kubevirt-hooks/domainplugins"
	"compsc.io/compsc/hack/kubevirt-hooks/hooks"
)

// collectTimeout is how long a sidecar's socket is looked for; virt-launcher
// itself takes 10 s.
const collectTimeout = 5 * time.Second

// pluginDir is where virt-launcher has the sockets of domain hooks.
const pluginDir = "/var/run/kubevirt-plugin"

// sidecars calls the sidecars whose sockets are in the directories below dir, and the
// domain hooks of the Plugin in file, if any, as virt-launcher does.
func sidecars(dir, file string, in io.Reader, out io.Writer) error {
	manager := hooks.NewManager(dir)
	var list []pluginv1alpha1.Plugin
	if file != "" {
		p, err := readPlugin(file)
		if err != nil {
			return err
		}
		if err := admit(p); err != nil {
			return err
		}
		plugins.SocketBaseDir = dir + "-plugin"
		for _, h := range p.Spec.DomainHooks {
			if h.Sidecar != nil {
				h.Sidecar.SocketPath = strings.Replace(h.Sidecar.SocketPath, pluginDir, plugins.SocketBaseDir, 1)
			}
		}
		list = append(list, *p)
	}
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
			if err == nil && len(list) > 0 {
				answer.Domain, err = domainHooks(list, answer.Domain, call.VMI)
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

// domainHooks goes on as SetDomainSpecStrWithHooks of
// pkg/virt-launcher/virtwrap/util does.
func domainHooks(list []pluginv1alpha1.Plugin, domain string, vmi *virtv1.VirtualMachineInstance) (string, error) {
	spec := &api.DomainSpec{}
	if err := xml.Unmarshal([]byte(domain), spec); err != nil {
		return "", err
	}
	_, domain, err := plugins.ApplyDomainHooks(list, vmi, spec, pluginv1alpha1.InvocationContextBoot)
	return domain, err
}

// admit compiles the conditions that are in the language of domain hooks, as
// validatePlugin of pkg/virt-api/webhooks does.
func admit(p *pluginv1alpha1.Plugin) error {
	conditions := []string{p.Spec.Condition}
	for _, h := range p.Spec.DomainHooks {
		conditions = append(conditions, h.Condition)
	}
	for _, c := range conditions {
		if c == "" {
			continue
		}
		if err := cel.GetEvaluator().CompileCondition(c); err != nil {
			return fmt.Errorf("KubeVirt does not admit the Plugin: %w", err)
		}
	}
	return nil
}
