package standin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/e2e/lab"
)

const (
	// migrationPort is the first of libvirt's migration_port_min.
	migrationPort = 49152
	// unlimited is what libvirt sets for "no limit", in bytes per second.
	unlimited = int64(1) << 53
	// downtimeLimit is QEMU's default, in milliseconds.
	downtimeLimit = 300
	// completionTimeout is KubeVirt's default for a VM of up to 1 GiB.
	completionTimeout = 150 * time.Second
	// finishTimeout bounds loading the last of the state and starting the VM;
	// longer than any hold of the target's gate.
	finishTimeout = time.Minute
)

// job is one migration as libvirt sees it.
type job struct {
	name           string
	vmi            *kubevirtv1.VirtualMachineInstance
	source, target *pod
	address        string

	// copying is closed when QEMU has begun to send the VM's memory, loaded
	// when the target has everything and is about to start the VM; both
	// domains are set then.
	copying, loaded chan struct{}
	src, dst        *domain

	done chan struct{}
	err  error // valid once done is closed

	abortOnce sync.Once
	aborted   chan struct{}
	timing    Timing // valid once done is closed
}

// Timing is when the VM stopped and started again, by the times of QEMU's
// events: one clock, as both QEMUs run on one machine.
type Timing struct {
	// Stopped is the source's STOP, Resumed the target's RESUME.
	Stopped, Resumed time.Time
}

// Timing returns the times of a migration that succeeded.
func (s *StandIn) Timing(migration types.UID) (Timing, bool) {
	j := s.job(migration)
	if j == nil {
		return Timing{}, false
	}
	select {
	case <-j.done:
		return j.timing, j.err == nil
	default:
		return Timing{}, false
	}
}

// Copying tells whether the migration has come to pre-copy.
func (s *StandIn) Copying(migration types.UID) bool {
	j := s.job(migration)
	if j == nil {
		return false
	}
	select {
	case <-j.copying:
		return true
	default:
		return false
	}
}

// Domains are the QEMU processes of a migration.
type Domains struct{ SourcePID, TargetPID int }

// Loaded returns the two QEMUs of a migration whose target has loaded
// everything, which is when neither runs the VM; held there by BeforeFinish.
func (s *StandIn) Loaded(migration types.UID) (Domains, bool) {
	j := s.job(migration)
	if j == nil {
		return Domains{}, false
	}
	select {
	case <-j.loaded:
		return Domains{SourcePID: j.src.proc.PID(), TargetPID: j.dst.proc.PID()}, true
	default:
		return Domains{}, false
	}
}

func (s *StandIn) job(migration types.UID) *job {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.jobs[migration]
}

// startJob starts the migration, if it has not been started.
func (s *StandIn) startJob(x *scope) error {
	if s.job(x.m.UID) != nil {
		return nil
	}
	source, err := s.activePod(x.v)
	if err != nil {
		return err
	}
	target := s.podOf(x.target.UID)
	if target == nil {
		return errPodDown
	}
	j := &job{
		name: x.m.Name, vmi: x.v.DeepCopy(), source: source, target: target,
		address: x.v.Status.MigrationState.TargetNodeAddress,
		copying: make(chan struct{}), loaded: make(chan struct{}),
		done: make(chan struct{}), aborted: make(chan struct{}),
	}
	s.mu.Lock()
	s.jobs[x.m.UID] = j
	s.mu.Unlock()
	m := &kubevirtv1.VirtualMachineInstanceMigration{ObjectMeta: metav1.ObjectMeta{Name: x.m.Name, Namespace: x.m.Namespace}}
	go func() {
		j.err = s.migrate(s.ctx, j)
		s.log.Info("libvirt's migration ended", "migration", j.name, "error", j.err)
		close(j.done)
		s.poke(s.pokeMigrations, m)
	}()
	return nil
}

// SpeedUp lifts the limit of SetBandwidth, for migrations under way too.
func (s *StandIn) SpeedUp(ctx context.Context) error {
	s.mu.Lock()
	s.bandwidth = 0
	jobs := make([]*job, 0, len(s.jobs))
	for _, j := range s.jobs {
		jobs = append(jobs, j)
	}
	s.mu.Unlock()
	for _, j := range jobs {
		select {
		case <-j.done:
			continue
		default:
		}
		if src := j.source.activeDomain(); src != nil {
			if err := src.do(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": unlimited}); err != nil {
				return err
			}
		}
	}
	return nil
}

// abort cancels the job if that is still possible. It does not wait.
//
// QEMU must not be told before its migration is "active": a migrate_cancel
// while it still connects is not passed on to the connection, whose return
// path QEMU then waits for in its main loop, for ever.
func (j *job) abort(ctx context.Context) {
	j.abortOnce.Do(func() {
		close(j.aborted)
		go func() {
			select {
			case <-j.copying:
			case <-j.done:
				return
			case <-ctx.Done():
				return
			}
			if src := j.source.activeDomain(); src != nil {
				// QEMU's answer is the migration's end. It refuses when
				// nothing is left to cancel.
				_ = src.do(ctx, "migrate_cancel", nil)
			}
		}()
	})
}

// migrate is libvirt's migration, version 3 of its protocol.
func (s *StandIn) migrate(ctx context.Context, j *job) error {
	src := j.source.activeDomain()
	if src == nil {
		return errors.New("the source domain is gone")
	}
	dst, err := s.prepare(ctx, j)
	if err != nil {
		s.finishPod(j.target, corev1.PodFailed)
		return fmt.Errorf("prepare: %w", err)
	}
	from := src.mark()
	err = s.perform(ctx, j, src)
	if err == nil {
		err = s.finish(ctx, j, src, dst)
	}
	if err != nil {
		why := errors.Join(err, tailIfEnded(dst.proc))
		s.finishPod(j.target, corev1.PodFailed)
		if rerr := resume(ctx, src); rerr != nil {
			return errors.Join(why, fmt.Errorf("the source VM does not resume: %w", rerr))
		}
		return why
	}
	stopped, ok1 := src.last(from, "STOP")
	resumed, ok2 := dst.last(0, "RESUME")
	if !ok1 || !ok2 {
		return errors.New("QEMU did not tell when the VM stopped and started")
	}
	j.timing = Timing{Stopped: stopped, Resumed: resumed}
	// Confirm: the source is not needed any more.
	s.finishPod(j.source, corev1.PodSucceeded)
	return nil
}

// prepare starts the target's QEMU and has it listen.
func (s *StandIn) prepare(ctx context.Context, j *job) (*domain, error) {
	dst, err := s.startDomain(ctx, j.target, j.vmi, true)
	if err != nil {
		return nil, err
	}
	if err := s.setDomain(j.target, dst); err != nil {
		return nil, err
	}
	if err := capabilities(ctx, dst, "events", "return-path", "late-block-activate"); err != nil {
		return nil, err
	}
	return dst, dst.do(ctx, "migrate-incoming", map[string]any{"uri": j.uri()})
}

func (j *job) uri() string { return fmt.Sprintf("tcp:%s:%d", j.address, migrationPort) }

// perform sends the VM. On error the source may be stopped or running.
func (s *StandIn) perform(ctx context.Context, j *job, src *domain) error {
	if err := capabilities(ctx, src, "events", "return-path", "pause-before-switchover"); err != nil {
		return err
	}
	s.mu.Lock()
	bandwidth := s.bandwidth
	s.mu.Unlock()
	if bandwidth == 0 {
		bandwidth = unlimited
	}
	if err := src.do(ctx, "migrate-set-parameters", map[string]any{
		"max-bandwidth": bandwidth, "downtime-limit": downtimeLimit,
	}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	from := src.mark()
	select {
	case <-j.aborted:
		return errors.New("operation aborted")
	default:
	}
	if err := src.do(ctx, "migrate", map[string]any{"uri": j.uri()}); err != nil {
		return err
	}
	if _, _, err := src.wait(ctx, from, migrationStatus("active", "failed", "cancelled")); err != nil {
		return fmt.Errorf("QEMU does not begin to migrate: %w", err)
	}
	close(j.copying)
	for {
		e, next, err := src.wait(ctx, from, migrationStatus("pre-switchover", "completed", "failed", "cancelled"))
		if err != nil {
			j.abort(context.WithoutCancel(ctx))
			return fmt.Errorf("the VM was not moved in time: %w", err)
		}
		from = next
		switch e.Data["status"] {
		case "completed":
			return nil
		case "cancelled":
			return errors.New("operation aborted")
		case "failed":
			return migrationError(ctx, src)
		}
		select {
		case <-s.held(InPreSwitchover):
		case <-j.aborted:
			continue // the cancellation's event follows
		}
		if err := src.do(ctx, "migrate-continue", map[string]any{"state": "pre-switchover"}); err != nil {
			select {
			case <-j.aborted:
			default:
				return err
			}
		}
	}
}

// finish starts the VM on the target.
func (s *StandIn) finish(ctx context.Context, j *job, src, dst *domain) error {
	load, cancel := context.WithTimeout(ctx, finishTimeout)
	defer cancel()
	// cont before the end of the load would start the VM behind our back.
	e, _, err := dst.wait(load, 0, migrationStatus("completed", "failed"))
	if err != nil {
		return fmt.Errorf("the target did not load the VM: %w", err)
	}
	if e.Data["status"] == "failed" {
		return errors.New("the target could not load the VM")
	}
	j.src, j.dst = src, dst
	close(j.loaded)
	select {
	case <-s.held(BeforeFinish):
	case <-ctx.Done():
		return ctx.Err()
	}
	start, cancel := context.WithTimeout(ctx, finishTimeout)
	defer cancel()
	if err := dst.run(start, "cont", nil, nil); err != nil {
		return fmt.Errorf("the target does not start the VM: %w", err)
	}
	if _, _, err := dst.wait(start, 0, func(e qmp.Event) bool { return e.Event == "RESUME" }); err != nil {
		return fmt.Errorf("the target does not start the VM: %w", err)
	}
	return nil
}

// resume makes a source run again after a migration failed.
func resume(ctx context.Context, src *domain) error {
	ctx, cancel := context.WithTimeout(ctx, finishTimeout)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		status, err := src.status(ctx)
		if err != nil {
			return err
		}
		switch status {
		case "running":
			return nil
		case "finish-migrate":
			// QEMU is still about to give up.
		default:
			if err := src.run(ctx, "cont", nil, nil); err != nil {
				return err
			}
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("QEMU is %s: %w", status, ctx.Err())
		}
	}
}

func capabilities(ctx context.Context, d *domain, names ...string) error {
	var caps []map[string]any
	for _, n := range names {
		caps = append(caps, map[string]any{"capability": n, "state": true})
	}
	return d.do(ctx, "migrate-set-capabilities", map[string]any{"capabilities": caps})
}

// migrationError is QEMU's own word on why a migration failed.
func migrationError(ctx context.Context, d *domain) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var info struct {
		Error string `json:"error-desc"`
	}
	if err := d.run(ctx, "query-migrate", nil, &info); err != nil {
		return errors.Join(errors.New("QEMU's migration failed"), err)
	}
	return fmt.Errorf("QEMU's migration failed: %s", info.Error)
}

func tailIfEnded(p *lab.Process) error {
	select {
	case <-p.Done():
		return logTail(p)
	default:
		return nil
	}
}
