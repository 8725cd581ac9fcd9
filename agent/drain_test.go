package agent

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"compsc.io/compsc/api/v1alpha1"
)

// drainBench is an agent of node a that is to end, whose API server may fail,
// and whose log is kept.
type drainBench struct {
	*lab
	*agent

	mu   sync.Mutex
	text bytes.Buffer
	fail error
	n    int // lists that were asked for
}

func newDrainBench(t *testing.T) *drainBench {
	t.Helper()
	b := &drainBench{lab: newLab(t)}
	b.agent = &agent{node: "a", client: b.lab.client, live: listReader{b.lab.client, b}, pokes: make(chan event.GenericEvent, 1),
		log: slog.New(slog.NewTextHandler(b, nil)), limits: limits{pause: time.Millisecond, call: waitLimit}}
	return b
}

// Write keeps the log.
func (b *drainBench) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *drainBench) says(text string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Contains(b.text.String(), text)
}

func (b *drainBench) lists() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n
}

func (b *drainBench) failing(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = err
}

// listReader lists as the bench lets it.
type listReader struct {
	client.Reader
	b *drainBench
}

func (r listReader) List(ctx context.Context, list client.ObjectList, opts ...client.ListOption) error {
	r.b.mu.Lock()
	r.b.n++
	err := r.b.fail
	r.b.mu.Unlock()
	if err != nil {
		return err
	}
	return r.Reader.List(ctx, list, opts...)
}

// migration makes one from a node to another, which is over or not.
func (b *drainBench) migration(name, from, to string, ended bool) *v1alpha1.VFMigration {
	b.t.Helper()
	m := &v1alpha1.VFMigration{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	if err := b.lab.client.Create(b.t.Context(), m); err != nil {
		b.t.Fatal(err)
	}
	m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: from}
	if to != "" {
		m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: to}
	}
	b.end(m, ended)
	return m
}

func (b *drainBench) end(m *v1alpha1.VFMigration, ended bool) {
	b.t.Helper()
	status := metav1.ConditionUnknown
	if ended {
		status = metav1.ConditionFalse
	}
	meta.SetStatusCondition(&m.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionSucceeded, Status: status, Reason: "Test"})
	if err := b.lab.client.Status().Update(b.t.Context(), m); err != nil {
		b.t.Fatal(err)
	}
}

// isDone says whether the context is.
func isDone(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return true
	default:
		return false
	}
}

// TestUntilDrained: an agent that is to end does so when the migrations of its
// node are over and its VFNode says that it takes no new ones.
func TestUntilDrained(t *testing.T) {
	for name, nodes := range map[string][2]string{"source": {"a", "b"}, "target": {"b", "a"}, "source, no target yet": {"a", ""}} {
		t.Run(name, func(t *testing.T) {
			b := newDrainBench(t)
			b.migration("over", "a", "b", true)
			b.migration("foreign", "b", "c", false)
			m := b.migration("own", nodes[0], nodes[1], false)
			ctx, end := context.WithCancel(t.Context())
			run, stop := b.untilDrained(ctx, waitLimit)
			defer stop()
			end()
			eventually(t, "it to say what it waits for", func() bool {
				return b.says("the agent ends when the migrations of its node have") && b.says("migrations=1")
			})
			select {
			case <-b.pokes:
			default:
				t.Error("the VFNode is not brought up to date")
			}
			n := b.lists()
			eventually(t, "it to look again", func() bool { return b.lists() > n+2 })
			b.end(m, true)
			n = b.lists()
			eventually(t, "it to look again", func() bool { return b.lists() > n+2 })
			if isDone(run) {
				t.Error("it ended before its VFNode says so")
			}
			b.drainTold.Store(true)
			eventually(t, "it to end", func() bool { return isDone(run) })
		})
	}
}

// TestDrainIsBounded: a migration that does not end does not hold the agent up
// for longer than it may.
func TestDrainIsBounded(t *testing.T) {
	b := newDrainBench(t)
	b.migration("own", "a", "b", false)
	ctx, end := context.WithCancel(t.Context())
	run, stop := b.untilDrained(ctx, 100*time.Millisecond)
	defer stop()
	end()
	eventually(t, "it to end", func() bool { return isDone(run) })
	if !b.says("the agent ends before the migrations of its node have") {
		t.Error("it does not say that it gave up waiting")
	}
}

// TestNoDrain: without a time for it the agent ends at once.
func TestNoDrain(t *testing.T) {
	b := newDrainBench(t)
	b.migration("own", "a", "b", false)
	ctx, end := context.WithCancel(t.Context())
	run, stop := b.untilDrained(ctx, 0)
	defer stop()
	end()
	if !isDone(run) || b.lists() != 0 {
		t.Errorf("ended: %v, after %d looks", isDone(run), b.lists())
	}
}

// TestDrainAnswers: an API server that is away is asked again; one that does not
// know the agent any more is not.
func TestDrainAnswers(t *testing.T) {
	group := schema.GroupResource{Group: v1alpha1.GroupVersion.Group, Resource: "vfmigrations"}
	for name, err := range map[string]error{"unauthorized": apierrors.NewUnauthorized("who?"), "forbidden": apierrors.NewForbidden(group, "", errors.New("not you"))} {
		t.Run(name, func(t *testing.T) {
			b := newDrainBench(t)
			b.migration("own", "a", "b", false)
			b.failing(errors.New("no answer"))
			ctx, end := context.WithCancel(t.Context())
			run, stop := b.untilDrained(ctx, waitLimit)
			defer stop()
			end()
			eventually(t, "it to ask again and again", func() bool { return b.lists() > 2 })
			if isDone(run) || !b.says("no answer") {
				t.Errorf("ended: %v, without knowing whether migrations are under way", isDone(run))
			}
			b.failing(err)
			eventually(t, "it to end", func() bool { return isDone(run) })
			if !b.says("its rights are withdrawn") {
				t.Error("it does not say why it ends")
			}
		})
	}
}

// TestVFNodeDrains: the VFNode of an agent that is to end says so, and only then
// is that known to be told.
func TestVFNodeDrains(t *testing.T) {
	l := newLab(t)
	n := l.nodes["a"]
	n.start()
	node := func() *metav1.Condition {
		v := &v1alpha1.VFNode{}
		if err := l.client.Get(t.Context(), client.ObjectKey{Name: "a"}, v); err != nil {
			return nil
		}
		return meta.FindStatusCondition(v.Status.Conditions, v1alpha1.ConditionReady)
	}
	eventually(t, "the node to be ready", func() bool { c := node(); return c != nil && c.Status == metav1.ConditionTrue })
	if n.agent.drainTold.Load() {
		t.Error("told already")
	}
	n.agent.draining.Store(true)
	eventually(t, "that to be told", n.agent.drainTold.Load)
	if c := node(); c.Status != metav1.ConditionFalse || c.Reason != v1alpha1.ReasonDraining {
		t.Errorf("the VFNode is %+v", c)
	}
}

// TestVFNodeWithoutCertificate: an agent that cannot prove its node serves
// nothing, and says so.
func TestVFNodeWithoutCertificate(t *testing.T) {
	b := newCertBench(t)
	b.c.host, b.c.tries, b.c.work = b.nodes["a"].host, newTries(), newWorkers(b.c.log)
	b.c.devices = newDevices(t.TempDir())
	ready := func() *metav1.Condition {
		t.Helper()
		if _, err := b.c.reconcileNode(t.Context(), ctrl.Request{}); err != nil {
			t.Fatal(err)
		}
		v := &v1alpha1.VFNode{}
		if err := b.client.Get(t.Context(), client.ObjectKey{Name: "a"}, v); err != nil {
			t.Fatal(err)
		}
		return meta.FindStatusCondition(v.Status.Conditions, v1alpha1.ConditionReady)
	}
	if c := ready(); c.Status != metav1.ConditionFalse || c.Reason != v1alpha1.ReasonCertificateUnavailable {
		t.Errorf("without a certificate the VFNode is %+v", c)
	}
	b.trusts(certPEM(b.ca))
	b.step()
	b.signs(b.asked(), time.Hour)
	b.step()
	if c := ready(); c.Status != metav1.ConditionTrue {
		t.Errorf("with a certificate the VFNode is %+v", c)
	}
}
