package agent

import (
	"context"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"compsc.io/compsc/api/v1alpha1"
)

// drain waits until no migration needs this agent, at most until ctx ends. The
// node's VFNode says meanwhile that no new one is to begin here. Restarting an
// agent in the midst of a migration does no harm, but it may cost the migration.
func (a *agent) drain(ctx context.Context) {
	a.draining.Store(true)
	a.poke()
	told := 0
	for {
		n, err := a.underWay(ctx)
		switch {
		case apierrors.IsUnauthorized(err) || apierrors.IsForbidden(err):
			a.log.Info("the agent ends: its rights are withdrawn, as when it is uninstalled", "error", err)
			return
		case err != nil:
			a.log.Warn("whether migrations are under way is not known", "error", err)
		case n == 0 && a.drainTold.Load():
			return
		case n > 0 && n != told:
			a.log.Info("the agent ends when the migrations of its node have", "migrations", n)
			told = n
		}
		if !pauseFor(ctx, a.limits.pause) {
			if ctx.Err() != nil {
				a.log.Warn("the agent ends before the migrations of its node have", "migrations", n)
			}
			return
		}
	}
}

// underWay counts the migrations that name this node and are not over.
func (a *agent) underWay(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, a.limits.call)
	defer cancel()
	var list v1alpha1.VFMigrationList
	if err := a.live.List(ctx, &list); err != nil {
		return 0, fmt.Errorf("listing VFMigrations: %w", err)
	}
	n := 0
	for i := range list.Items {
		if m := &list.Items[i]; !over(m) && (a.isSource(m) || a.isTarget(m)) {
			n++
		}
	}
	return n, nil
}

// untilDrained returns a context that ends once ctx has and the agent is
// drained, or drainTimeout has passed.
func (a *agent) untilDrained(ctx context.Context, drainTimeout time.Duration) (context.Context, context.CancelFunc) {
	if drainTimeout <= 0 {
		return context.WithCancel(ctx)
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() {
		bounded, cancel := context.WithTimeout(run, drainTimeout)
		defer cancel()
		a.drain(bounded)
		stop()
	})
	return run, stop
}
