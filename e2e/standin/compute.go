package standin

import (
	"context"

	corev1 "k8s.io/api/core/v1"
)

// compute is the compute container of a pod, with what runs a VM in it.
type compute interface {
	// ended is closed when it has ended.
	ended() <-chan struct{}
	// silent is closed when no QEMU will tell anything any more.
	silent() <-chan struct{}
	// kill ends it with all that runs in it.
	kill()
	// start starts the VM of a libvirt domain.
	start(ctx context.Context, doc string, paused bool) error
	// migrate moves the job's VM from here, and returns when the target is about
	// to run it, or this has it back.
	migrate(ctx context.Context, j *job, src *domain) error
	// abort cancels the migration under way. It refuses when there is nothing
	// left to cancel.
	abort(ctx context.Context, d *domain) error
	// setSpeed limits the migration under way, in MiB/s.
	setSpeed(ctx context.Context, d *domain, limit uint64) error
	// running tells whether the VM runs.
	running(ctx context.Context, d *domain) (bool, error)
	// fate is how the pod ends whose QEMU has ended: well, if its VM moved away.
	fate(ctx context.Context, d *domain) corev1.PodPhase
	// pid is QEMU's process.
	pid() (int, error)
	// console is a file of this machine with what the guest prints.
	console(p *pod) string
}
