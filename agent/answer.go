package agent

import (
	"context"
	"errors"
)

// answerAttached has the VFs that a device process has answer to the VM's
// addresses, or no more. Of a migration's two sides only one does at a time:
// the source's stop once they were relinquished, the target's begin after
// that, and before the source's have theirs back the target's stop. It needs
// no API server, for the VM stands still meanwhile, and may be repeated.
func (a *agent) answerAttached(ctx context.Context, d *device, on bool) error {
	st, err := a.status(ctx, d)
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range st.GetInterfaces() {
		if i.GetVf() != "" {
			errs = append(errs, a.host.Answer(ctx, i.GetVf(), on))
		}
	}
	return errors.Join(errs...)
}

// answerNoMore has the VFs that are leased to a pod answer to no address of
// the VM's. The pod's device process may be gone.
func (a *agent) answerNoMore(ctx context.Context, pod holder) error {
	leases, err := a.vfLeases(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for address, l := range leases {
		if identity(l) == pod.String() {
			errs = append(errs, a.host.Answer(ctx, address, false))
		}
	}
	return errors.Join(errs...)
}
