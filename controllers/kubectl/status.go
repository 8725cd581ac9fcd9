package kubectl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilwait "k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

// summary is the condition Succeeded; one that is not written yet is Unknown.
func summary(m *v1alpha1.VFMigration) metav1.Condition {
	if c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionSucceeded); c != nil {
		return *c
	}
	return metav1.Condition{Type: v1alpha1.ConditionSucceeded, Status: metav1.ConditionUnknown}
}

func ended(m *v1alpha1.VFMigration) bool { return summary(m).Status != metav1.ConditionUnknown }

// follow shows how m goes until its end, which it leaves in m, and returns an
// error unless that is a good one. On a terminal one line is overwritten; else
// there is one for each change.
func (p *plugin) follow(cmd *cobra.Command, c client.Client, m *v1alpha1.VFMigration, timeout time.Duration) error {
	key := client.ObjectKeyFromObject(m)
	out, width, shown := cmd.ErrOrStderr(), columns(cmd.ErrOrStderr()), ""
	var away error // the API server's, at the last look
	err := utilwait.PollUntilContextTimeout(cmd.Context(), p.poll, timeout, true, func(ctx context.Context) (bool, error) {
		err := c.Get(ctx, key, m)
		if reason := apierrors.ReasonForError(err); err != nil && reason != metav1.StatusReasonUnknown && !apierrors.IsServiceUnavailable(err) &&
			!apierrors.IsTimeout(err) && !apierrors.IsServerTimeout(err) && !apierrors.IsTooManyRequests(err) && !apierrors.IsInternalError(err) {
			return false, fmt.Errorf("VFMigration %s: %w", key, err)
		}
		if away = err; away != nil {
			return false, nil // it may come back; the migration does not wait for us
		}
		line := progress(m)
		if width > 0 {
			age := p.clock.Since(m.CreationTimestamp.Time).Truncate(time.Second)
			fmt.Fprintf(out, "\r\x1b[K%s", cut(fmt.Sprintf("%s  %s", line, age), width))
		} else if line != shown {
			fmt.Fprintln(out, line)
		}
		shown = line
		return ended(m), nil
	})
	if width > 0 {
		fmt.Fprintln(out)
	}
	switch {
	case away != nil && err != nil:
		return fmt.Errorf("no longer waited for: VFMigration %s: %w", key, away)
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled):
		return fmt.Errorf("no longer waited for: VFMigration %s goes on, in phase %s; see `kubectl vfmigration status %s`, or abort it", key, m.Status.Phase, m.Name)
	case err != nil:
		return err
	}
	if err := p.show(cmd.OutOrStdout(), m); err != nil {
		return err
	}
	if s := summary(m); s.Status != metav1.ConditionTrue {
		return fmt.Errorf("VFMigration %s failed: %s: %s", key, s.Reason, s.Message)
	}
	return nil
}

// progress is how a migration stands, in a line.
func progress(m *v1alpha1.VFMigration) string {
	phase := m.Status.Phase
	if phase == "" {
		phase = v1alpha1.PhasePending
	}
	return fmt.Sprintf("%s: %-11s  %s", m.Name, phase, way(m))
}

// cut shortens a line so that it stays one on a terminal of that width: what
// wraps cannot be overwritten.
func cut(line string, width int) string {
	if r := []rune(line); len(r) >= width {
		return string(r[:width-1])
	}
	return line
}

// way is from where to where the VM moves.
func way(m *v1alpha1.VFMigration) string {
	from, to := "?", "?"
	if s := m.Status.Source; s != nil {
		from = s.NodeName
	}
	if t := m.Status.Target; t != nil {
		to = t.NodeName
	}
	return from + " -> " + to
}

// show prints a migration for people, or as an object if that was asked for.
func (p *plugin) show(w io.Writer, m *v1alpha1.VFMigration) error {
	if p.output != "" {
		return p.print(w, m)
	}
	st := &m.Status
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "VFMigration:\t%s/%s\n", m.Namespace, m.Name)
	fmt.Fprintf(t, "VM:\t%s, %s\n", m.Spec.VMIName, way(m))
	if st.MigrationRef != nil {
		fmt.Fprintf(t, "Migration:\t%s\n", st.MigrationRef.Name)
	}
	fmt.Fprintf(t, "Phase:\t%s\n", cmp.Or(st.Phase, v1alpha1.PhasePending))
	if d := st.Downtime; d != nil {
		gap := "no frames yet"
		if d.LinkGap != nil {
			gap = rounded(d.LinkGap.Duration).String()
		}
		fmt.Fprintf(t, "Stood still:\tVM %s, VFs %s, traffic %s\n", rounded(d.VMStopped.Duration), rounded(d.DeviceStopped.Duration), gap)
	}
	if f := st.Failure; f != nil {
		fmt.Fprintf(t, "Failure:\t%s: %s\n", f.Reason, f.Message)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(st.Conditions) > 0 {
		fmt.Fprintln(t, "\nAFTER\tCONDITION\tSTATUS\tREASON\tMESSAGE")
		list := slices.Clone(st.Conditions)
		// Times are whole seconds; within one, the order of progress counts.
		slices.SortStableFunc(list, func(a, b metav1.Condition) int {
			return cmp.Or(a.LastTransitionTime.Compare(b.LastTransitionTime.Time), cmp.Compare(place(a.Type), place(b.Type)))
		})
		for _, c := range list {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", c.LastTransitionTime.Sub(m.CreationTimestamp.Time), c.Type, c.Status, c.Reason, c.Message)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	if len(st.Steps) > 0 {
		fmt.Fprintln(t, "\nSTEP\tTOOK")
		for _, s := range st.Steps {
			fmt.Fprintf(t, "%s\t%s\n", s.Name, rounded(s.Took.Duration))
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	if len(st.Devices) > 0 {
		fmt.Fprintln(t, "\nINTERFACE\tMAC\tSOURCE VF\tTARGET VF\tSTATE\tPAGES\tREPLAYED\tHEADS")
		for _, d := range st.Devices {
			source, target := cmp.Or(d.Source, &v1alpha1.VFReference{}), cmp.Or(d.Target, &v1alpha1.VFReference{})
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d B\t%d\t%d\t%s\n", d.Interface, cmp.Or(target.MAC, source.MAC, "-"), cmp.Or(source.VF, "-"), cmp.Or(target.VF, "-"),
				d.StateBytes, d.PagesMarked, d.ReplayedOperations, cmp.Or(d.HeadsStrategy, "-"))
		}
		return t.Flush()
	}
	return nil
}

// order of the conditions in a migration that goes well, and its end.
var order = []string{v1alpha1.ConditionAccepted, v1alpha1.ConditionTargetPinned, v1alpha1.ConditionPrepared, v1alpha1.ConditionCaptured,
	v1alpha1.ConditionRestored, v1alpha1.ConditionVerified, v1alpha1.ConditionRolledBack, v1alpha1.ConditionSucceeded}

func place(typ string) int { return slices.Index(order, typ) }

// rounded leaves three or four digits of a time.
func rounded(d time.Duration) time.Duration {
	switch {
	case d >= time.Second:
		return d.Round(time.Millisecond)
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(100 * time.Nanosecond)
}
