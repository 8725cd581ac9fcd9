package standin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	corev1 "k8s.io/api/core/v1"
)

func (x *launcher) ended() <-chan struct{} { return x.proc.Done() }

func (x *launcher) silent() <-chan struct{} { return x.proc.Done() }

func (x *launcher) kill() { x.proc.Stop(0) }

func (x *launcher) console(p *pod) string { return filepath.Join(x.private(p), consoleLog) }

func (x *launcher) start(ctx context.Context, doc string, paused bool) error {
	err := x.call(ctx, func(l *libvirt.Libvirt) error {
		d, err := l.DomainDefineXML(doc)
		if err != nil {
			return err
		}
		var flags libvirt.DomainCreateFlags
		if paused {
			flags = libvirt.DomainStartPaused
		}
		_, err = l.DomainCreateWithFlags(d, uint32(flags))
		return err
	})
	if err != nil {
		return errors.Join(err, logTail(x.proc))
	}
	return nil
}

// do has libvirt do something with the domain.
func (x *launcher) do(ctx context.Context, d *domain, do func(*libvirt.Libvirt, libvirt.Domain) error) error {
	return x.call(ctx, func(l *libvirt.Libvirt) error {
		found, err := l.DomainLookupByName(d.name)
		if err != nil {
			return err
		}
		return do(l, found)
	})
}

func (x *launcher) abort(ctx context.Context, d *domain) error {
	return x.do(ctx, d, func(l *libvirt.Libvirt, d libvirt.Domain) error { return l.DomainAbortJob(d) })
}

func (x *launcher) setSpeed(ctx context.Context, d *domain, limit uint64) error {
	return x.do(ctx, d, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		return l.DomainMigrateSetMaxSpeed(d, limit, 0)
	})
}

func (x *launcher) running(ctx context.Context, d *domain) (bool, error) {
	state, err := x.state(ctx, d)
	if err == nil && state != libvirt.DomainRunning {
		err = fmt.Errorf("libvirt says state %d", state)
	}
	return err == nil, err
}

// state is libvirt's word on the domain.
func (x *launcher) state(ctx context.Context, d *domain) (state libvirt.DomainState, err error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	err = x.do(ctx, d, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		n, _, err := l.DomainGetState(d, 0)
		state = libvirt.DomainState(n)
		return err
	})
	return state, err
}

func (x *launcher) fate(ctx context.Context, d *domain) corev1.PodPhase {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		var state, reason int32
		err := x.do(ctx, d, func(l *libvirt.Libvirt, d libvirt.Domain) (err error) {
			state, reason, err = l.DomainGetState(d, 0)
			return err
		})
		if err != nil || libvirt.DomainState(state) == libvirt.DomainShutoff {
			if err == nil && libvirt.DomainShutoffReason(reason) == libvirt.DomainShutoffMigrated {
				return corev1.PodSucceeded
			}
			return corev1.PodFailed
		}
		select { // libvirt has not taken it in yet
		case <-t.C:
		case <-ctx.Done():
			return corev1.PodFailed
		}
	}
}

func (x *launcher) pid() (int, error) {
	pids, err := x.processes("qemu-system-x86")
	if err != nil {
		return 0, err
	}
	if len(pids) != 1 {
		return 0, fmt.Errorf("%d QEMUs of libvirtd %d, want 1", len(pids), x.proc.PID())
	}
	return pids[0], nil
}
