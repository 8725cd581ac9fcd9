package standin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"libvirt.org/go/libvirtxml"
)

const (
	// unlimited is more than any link has, in MiB/s.
	unlimited = 1 << 20
	// completionTimeout is KubeVirt's default for a VM of up to 1 GiB.
	completionTimeout = 150 * time.Second
	// finishTimeout bounds what libvirt does after a migration failed.
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
	// observed is closed once both domains are set, stopped when the source's VM
	// has stopped for a migration that is held InPreSwitchover.
	observed, stopped chan struct{}
	src, dst          *domain
	// performed is closed when libvirt's call has returned.
	performed chan struct{}

	done chan struct{}
	err  error // valid once done is closed

	abortOnce sync.Once
	aborted   chan struct{}
	timing    Timing // valid once done is closed
}

// Timing is when the VM stopped and started again, by the times of QEMU's
// events: one clock, as both QEMUs run on one machine, unless nodes are machines of
// their own.
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

// Stopped returns the two QEMUs of a migration that is held InPreSwitchover, once
// the VM has stopped on the source, and its last pages are still to be sent.
func (s *StandIn) Stopped(migration types.UID) (Domains, bool) {
	j := s.job(migration)
	if j == nil {
		return Domains{}, false
	}
	for _, c := range []chan struct{}{j.observed, j.stopped} {
		select {
		case <-c:
		default:
			return Domains{}, false
		}
	}
	return j.domains()
}

func (j *job) domains() (Domains, bool) {
	source, err1 := j.src.compute.pid()
	target, err2 := j.dst.compute.pid()
	return Domains{SourcePID: source, TargetPID: target}, errors.Join(err1, err2) == nil
}

// Loaded returns the two QEMUs of a migration whose target has loaded
// everything, which is when neither runs the VM; held there by BeforeFinish.
func (s *StandIn) Loaded(migration types.UID) (Domains, bool) {
	j := s.job(migration)
	if j == nil {
		return Domains{}, false
	}
	select {
	case <-j.loaded:
		return j.domains()
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
		copying: make(chan struct{}), loaded: make(chan struct{}), performed: make(chan struct{}),
		observed: make(chan struct{}), stopped: make(chan struct{}),
		done: make(chan struct{}), aborted: make(chan struct{}),
	}
	s.mu.Lock()
	s.jobs[x.m.UID] = j
	s.mu.Unlock()
	m := &kubevirtv1.VirtualMachineInstanceMigration{ObjectMeta: metav1.ObjectMeta{Name: x.m.Name, Namespace: x.m.Namespace}}
	go func() {
		j.err = s.migrate(s.ctx, j)
		s.log.Info("the VM's move ended", "migration", j.name, "error", j.err)
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
		src := j.source.activeDomain()
		if src == nil {
			continue
		}
		if err := src.compute.setSpeed(ctx, src, unlimited); err != nil {
			return err
		}
	}
	return nil
}

// abort cancels the job if that is still possible. It does not wait.
//
// libvirt must not be told before QEMU's migration is "active": a
// migrate_cancel while QEMU still connects is not passed on to the connection,
// whose return path QEMU then waits for in its main loop, for ever.
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
				// libvirt's answer is the migration's end. It refuses when
				// nothing is left to cancel.
				_ = src.compute.abort(ctx, src)
			}
		}()
	})
}

// migrate has the source move the VM, as virt-launcher does.
func (s *StandIn) migrate(ctx context.Context, j *job) error {
	src := j.source.activeDomain()
	if src == nil {
		return errors.New("the source domain is gone")
	}
	for _, p := range []*pod{j.source, j.target} {
		p.mu.Lock()
		p.job = j
		p.mu.Unlock()
	}
	from := src.mark()
	watch, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { s.watchSource(watch, j, src, from) })
	wg.Go(func() { s.watchTarget(watch, j) })
	limit := time.AfterFunc(s.bound(completionTimeout), func() { j.abort(ctx) })
	err := j.source.compute.migrate(ctx, j, src)
	close(j.performed)
	limit.Stop()
	if err != nil {
		stop()
	}
	// What the target's QEMU said is read to its end.
	time.AfterFunc(s.bound(finishTimeout), stop)
	wg.Wait()
	if err != nil {
		s.finishPod(j.target, corev1.PodFailed)
		if rerr := runs(ctx, src); rerr != nil {
			return errors.Join(err, fmt.Errorf("the source VM does not resume: %w", rerr))
		}
		return err
	}
	if j.dst == nil {
		return errors.New("the target's QEMU was never seen")
	}
	if _, _, err := j.dst.wait(ctx, 0, func(e qmp.Event) bool { return e.Event == "RESUME" }); err != nil {
		return fmt.Errorf("the VM does not run on the target: %w", err)
	}
	stopped, ok1 := src.last(from, "STOP")
	resumed, ok2 := j.dst.last(0, "RESUME")
	if !ok1 || !ok2 {
		return errors.New("QEMU did not tell when the VM stopped and started")
	}
	j.timing = Timing{Stopped: stopped, Resumed: resumed}
	s.finishPod(j.source, corev1.PodSucceeded)
	return nil
}

// migrate makes the call that virt-launcher makes, with its flags and parameters
// (pkg/virt-launcher/virtwrap/live-migration-source.go of KubeVirt:
// generateMigrationFlags, generateMigrationParams). The domain that is to run
// on the target is the source's, as libvirt would migrate it.
func (x *launcher) migrate(ctx context.Context, j *job, src *domain) error {
	proxies, err := x.standIn.startProxies(j.source, j.target, j.address)
	if err != nil {
		return err
	}
	defer proxies.close()
	bandwidth := x.standIn.limit()
	return x.do(ctx, src, func(l *libvirt.Libvirt, d libvirt.Domain) error {
		doc, err := l.DomainGetXMLDesc(d, libvirt.DomainXMLMigratable)
		if err != nil {
			return err
		}
		x := &libvirtxml.Domain{}
		if err := x.Unmarshal(doc); err != nil {
			return err
		}
		if doc, err = x.Marshal(); err != nil {
			return err
		}
		text := func(name, value string) libvirt.TypedParam {
			return libvirt.TypedParam{Field: name, Value: *libvirt.NewTypedParamValueString(value)}
		}
		params := []libvirt.TypedParam{
			text(libvirt.MigrateParamURI, "unix://"+proxyPath(migrationProxy)),
			text(libvirt.MigrateParamDestXML, doc),
			text(libvirt.MigrateParamPersistXML, doc),
			text(libvirt.MigrateParamDestName, src.name),
		}
		if bandwidth > 0 {
			params = append(params, libvirt.TypedParam{Field: libvirt.MigrateParamBandwidth, Value: *libvirt.NewTypedParamValueUllong(bandwidth)})
		}
		_, err = l.DomainMigratePerform3Params(d,
			libvirt.OptString{"qemu+unix:///system?socket=" + proxyPath(libvirtProxy)},
			params, nil, libvirt.MigrateLive|libvirt.MigratePeer2peer|libvirt.MigratePersistDest)
		return err
	})
}

// limit is the bandwidth for a migration, in MiB/s, 0 for none. One that is to
// be held within libvirt's part starts slowly, so that nothing is missed.
func (s *StandIn) limit() uint64 {
	if s.isHeld(InPreSwitchover) || s.isHeld(BeforeFinish) {
		return 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint64(s.bandwidth >> 20)
}

// watchSource tells when pre-copy begins, and holds the migration in libvirt's
// part if a test asks for it: libvirt itself stands still there.
func (s *StandIn) watchSource(ctx context.Context, j *job, src *domain, from int) {
	if _, _, err := src.wait(ctx, from, migrationStatus("active")); err != nil {
		return
	}
	type hold struct {
		release  <-chan struct{}
		aborted  <-chan struct{}
		libvirtd *launcher
	}
	var holds []hold
	preSwitchover := s.isHeld(InPreSwitchover)
	if preSwitchover {
		holds = append(holds, hold{s.held(InPreSwitchover), j.aborted, j.source.launcher})
	}
	if s.isHeld(BeforeFinish) {
		// Nothing can be cancelled there.
		holds = append(holds, hold{s.held(BeforeFinish), nil, j.target.launcher})
	}
	for _, h := range holds {
		if err := h.libvirtd.signal(unix.SIGSTOP); err != nil {
			s.log.Error("hold", "migration", j.name, "error", err)
		}
	}
	if len(holds) > 0 {
		if err := src.run(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(unlimited) << 20}, nil); err != nil {
			s.log.Error("hold", "migration", j.name, "error", err)
		}
	}
	close(j.copying)
	if preSwitchover {
		go func() {
			if _, _, err := src.wait(ctx, from, migrationStatus("pre-switchover")); err == nil {
				close(j.stopped)
			}
		}()
	}
	for _, h := range holds {
		select {
		case <-h.release:
		case <-h.aborted:
		case <-ctx.Done():
		}
		if err := h.libvirtd.signal(unix.SIGCONT); err != nil {
			s.log.Error("hold", "migration", j.name, "error", err)
		}
	}
}

// watchTarget watches the QEMU that libvirt starts on the target.
func (s *StandIn) watchTarget(ctx context.Context, j *job) {
	dst, err := s.observe(ctx, j.target, j.vmi)
	if err != nil {
		return
	}
	if err := s.setDomain(j.target, dst); err != nil {
		return
	}
	j.dst, j.src = dst, j.source.activeDomain()
	close(j.observed)
	// The VM may run a moment later; the migration's end is no reason to look away.
	if _, _, err := dst.wait(ctx, 0, migrationStatus("completed")); err == nil {
		close(j.loaded)
	}
}

// runs waits until the VM of a source runs again after a migration failed.
func runs(ctx context.Context, src *domain) error {
	ctx, cancel := context.WithTimeout(ctx, finishTimeout)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		ok, err := src.compute.running(ctx, src)
		if ok {
			return nil
		}
		select {
		case <-t.C:
		case <-src.gone():
			return errMonitorClosed
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}
