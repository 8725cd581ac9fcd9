package standin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	kubevirtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/agent/kubevirt/hook/callbackspb"
	"compsc.io/compsc/agent/kubevirt/hook/infopb"
)

// hookTimeout bounds a call of a hook, infoTimeout that which asks for the hooks, as
// virt-launcher does.
const hookTimeout, infoTimeout = time.Minute, time.Second

// collect finds the sidecar's hook socket as virt-launcher does: all that lies
// in a sidecar's directory and is no directory must answer Info.
func (p *pod) collect(ctx context.Context) error {
	entries, err := os.ReadDir(p.sidecarDir())
	if err != nil {
		return err
	}
	found := ""
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		conn, err := dialSocket(p.sidecarDir(), e.Name())
		if err != nil {
			return err
		}
		defer conn.Close()
		call, cancel := context.WithTimeout(ctx, p.bound(infoTimeout))
		info, err := infopb.NewInfoClient(conn).Info(call, &infopb.InfoParams{})
		cancel()
		if err != nil {
			return fmt.Errorf("hook socket %s: %w", e.Name(), err)
		}
		if !slices.Contains(info.Versions, "v1alpha3") ||
			!slices.ContainsFunc(info.HookPoints, func(h *infopb.HookPoint) bool { return h.Name == "OnDefineDomain" }) {
			return fmt.Errorf("hook socket %s does not want to define domains: %v", e.Name(), info)
		}
		found = e.Name()
	}
	if found == "" {
		return errors.New("the sidecar has no hook socket yet")
	}
	p.mu.Lock()
	p.hookSocket = found
	p.mu.Unlock()
	return nil
}

// callbacks calls the sidecar, once it was found.
func (p *pod) callbacks(ctx context.Context, do func(context.Context, callbackspb.CallbacksClient) error) error {
	p.mu.Lock()
	name := p.hookSocket
	p.mu.Unlock()
	if name == "" {
		if err := p.collect(ctx); err != nil {
			return fmt.Errorf("pod %s: %w", filepath.Base(p.name), err)
		}
		p.mu.Lock()
		name = p.hookSocket
		p.mu.Unlock()
	}
	conn, err := dialSocket(p.sidecarDir(), name)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, p.bound(hookTimeout))
	defer cancel()
	return do(ctx, callbackspb.NewCallbacksClient(conn))
}

// onDefineDomain returns what the sidecar makes of the domain.
func (p *pod) onDefineDomain(ctx context.Context, doc string, v *kubevirtv1.VirtualMachineInstance) (out string, err error) {
	vmi, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	err = p.callbacks(ctx, func(ctx context.Context, c callbackspb.CallbacksClient) error {
		r, err := c.OnDefineDomain(ctx, &callbackspb.OnDefineDomainParams{DomainXML: []byte(doc), Vmi: vmi})
		out = string(r.GetDomainXML())
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%w: %w", errRefused, err)
	}
	return out, nil
}

// shutdown tells the sidecar that the VM has ended.
func (p *pod) shutdown() error {
	ctx, cancel := context.WithTimeout(context.Background(), p.bound(shutdownGrace))
	defer cancel()
	return p.callbacks(ctx, func(ctx context.Context, c callbackspb.CallbacksClient) error {
		_, err := c.Shutdown(ctx, &callbackspb.ShutdownParams{})
		return err
	})
}
