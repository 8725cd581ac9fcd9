//go:build e2echart

package chart

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
)

// user is a person with the rights that docs/operating.md says are enough, a
// kubectl and its plugin.
type user struct {
	env     []string
	kubectl string
}

// newUser makes a user of the VM's namespace.
func (w *world) newUser(t *testing.T, ctx context.Context) *user {
	t.Helper()
	const name = "user"
	subject := []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: harness.Namespace, Name: name}}
	bound := func(role client.Object, ns string) client.Object {
		kind := "ClusterRole"
		if role.GetNamespace() != "" {
			kind = "Role"
		}
		ref := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: kind, Name: role.GetName()}
		if ns == "" {
			return &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: role.GetName()}, RoleRef: ref, Subjects: subject}
		}
		return &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: role.GetName()}, RoleRef: ref, Subjects: subject}
	}
	page, err := os.ReadFile(filepath.Join(filepath.Dir(w.set.Config), "docs", "operating.md"))
	check(t, err)
	roles := regexp.MustCompile("(?s)\n```yaml\n(.*?)\n```\n").FindStringSubmatch(string(page))
	if roles == nil {
		t.Fatal("docs/operating.md has no roles of users")
	}
	where := map[string]string{"compsc-user-of-a-namespace": harness.Namespace, "compsc-user-of-the-cluster": "", "compsc-user-of-the-installation": namespace}
	for _, role := range objects(t, roles[1]) {
		ns, ok := where[role.GetName()]
		if !ok {
			t.Fatalf("docs/operating.md has a role %s", role.GetName())
		}
		delete(where, role.GetName())
		check(t, w.h.Client().Create(ctx, role))
		check(t, w.h.Client().Create(ctx, bound(role, ns)))
	}
	if len(where) > 0 {
		t.Fatalf("docs/operating.md lacks the roles %v", where)
	}
	check(t, w.h.Client().Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: harness.Namespace, Name: name}}))
	cfg, err := w.kubeconfig(ctx, name, harness.Namespace, name, nil)
	check(t, err)
	bin := filepath.Join(t.TempDir(), "bin")
	check(t, os.Mkdir(bin, 0o755))
	for _, link := range []string{"kubectl-vfmigration", "kubectl_complete-vfmigration"} {
		check(t, os.Symlink(w.set.Compsc, filepath.Join(bin, link)))
	}
	return &user{kubectl: filepath.Join(w.set.ControlPlane, "kubectl"),
		env: []string{"KUBECONFIG=" + cfg, "PATH=" + bin + ":/usr/bin:/bin", "HOME=" + t.TempDir(), "TERM=xterm"}}
}

// run runs kubectl and returns what it writes to its outputs.
func (u *user) run(ctx context.Context, args ...string) (out, progress string, err error) {
	var stdout, stderr strings.Builder
	c := exec.CommandContext(ctx, u.kubectl, args...)
	c.Env, c.Stdout, c.Stderr = u.env, &stdout, &stderr
	err = c.Run()
	return stdout.String(), stderr.String(), err
}

// must runs kubectl, which is to succeed, and returns its output.
func (u *user) must(t *testing.T, ctx context.Context, args ...string) string {
	t.Helper()
	out, progress, err := u.run(ctx, args...)
	if err != nil {
		t.Fatalf("kubectl %q: %v\n%s%s", args, err, out, progress)
	}
	return out
}

// refused runs kubectl, which is to fail with status 1 and say the text.
func (u *user) refused(t *testing.T, ctx context.Context, says string, args ...string) {
	t.Helper()
	out, progress, err := u.run(ctx, args...)
	if err == nil || !strings.Contains(progress, says) {
		t.Errorf("kubectl %q: %v\n%s%s\nwant a failure that says %q", args, err, out, progress, says)
	}
}

// onTerminal runs kubectl on a terminal of that width and returns what a
// person sees: all that was written.
func (u *user) onTerminal(t *testing.T, ctx context.Context, width int, args ...string) string {
	t.Helper()
	c := exec.CommandContext(ctx, "script", "--quiet", "--return", "--command",
		fmt.Sprintf("stty cols %d rows 40 && %s %s", width, u.kubectl, strings.Join(args, " ")), os.DevNull)
	c.Env = u.env
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl %q on a terminal: %v\n%s", args, err, out)
	}
	return string(out)
}

// kubectl: the plugin, as a user runs it; and what the README shows is what
// kubectl prints.
func (w *world) kubectl(t *testing.T) {
	ctx := within(t, 5*time.Minute)
	u := w.newUser(t, ctx)
	at := func() (from, to string) {
		t.Helper()
		from, err := w.h.VMNode(ctx)
		check(t, err)
		return from, harness.Other(from)
	}
	from, to := at()

	if got, want := u.must(t, ctx, "vfmigration", "preflight", harness.VMI), fmt.Sprintf("VM %s/%s can be moved away from node %s.\n", harness.Namespace, harness.VMI, from); got != want {
		t.Errorf("preflight: %q, want %q", got, want)
	}
	u.refused(t, ctx, v1alpha1.ReasonTargetNotFound, "vfmigration", "preflight", harness.VMI, "--to-node", from)
	u.refused(t, ctx, v1alpha1.ReasonVMINotFound, "vfmigration", "preflight", "nobody")
	var verdict struct {
		Accepted   bool
		SourceNode string
	}
	check(t, json.Unmarshal([]byte(u.must(t, ctx, "vfmigration", "preflight", harness.VMI, "-o", "json")), &verdict))
	if !verdict.Accepted || verdict.SourceNode != from {
		t.Errorf("preflight -o json: %+v", verdict)
	}

	// On a terminal: one line that tells how it goes, and then the account.
	const width = 72
	seen := u.onTerminal(t, ctx, width, "vfmigration", "migrate", harness.VMI, "--wait", "--name", "by-hand", "--to-node", to)
	t.Logf("migrate --wait on a terminal of %d columns: %q", width, seen)
	live, account, ok := strings.Cut(seen, "\r\n")
	updates := strings.Split(live, "\r\x1b[K")
	if !ok || len(updates) < 3 || updates[0] != "" {
		t.Fatalf("there is no live line in %q", seen)
	}
	phases := []string{"Pending", "Pinning", "Preparing", "Copying", "Switching", "Verifying", "Succeeded"}
	last, moves := 0, regexp.MustCompile(`^by-hand: (\w+) +(\S+ -> \S+)  [0-9ms]+$`)
	distinct := map[string]bool{}
	for _, line := range updates[1:] {
		m := moves.FindStringSubmatch(line)
		if m == nil || len(line) >= width {
			t.Fatalf("the live line is once %q", line)
		}
		p := slices.Index(phases, m[1])
		if p < last {
			t.Errorf("phase %s follows %s", m[1], phases[last])
		}
		last = p
		distinct[m[1]] = true
	}
	if want := "by-hand: Succeeded    " + from + " -> " + to; !strings.HasPrefix(updates[len(updates)-1], want) || len(distinct) < 2 {
		t.Errorf("the live line ends with %q after %d phases, want %q after several", updates[len(updates)-1], len(distinct), want)
	}
	if status := u.must(t, ctx, "vfmigration", "status", "by-hand"); strings.ReplaceAll(account, "\r\n", "\n") != status {
		t.Errorf("the account is\n%s\nand the status\n%s", account, status)
	}
	_, err := w.vm.CheckUndisturbed(ctx)
	check(t, err)

	// In a pipe: a line for each change.
	from, to = at()
	_, progress, err := u.run(ctx, "vfmigration", "migrate", harness.VMI, "--wait", "--name", "piped")
	check(t, err)
	lines := strings.Split(strings.TrimSpace(progress), "\n")
	if strings.Contains(progress, "\r") || strings.Contains(progress, "\x1b") || len(slices.Compact(slices.Clone(lines))) != len(lines) ||
		!strings.HasPrefix(lines[len(lines)-1], "piped: Succeeded    "+from+" -> "+to) {
		t.Errorf("progress in a pipe: %q", progress)
	}

	for _, format := range []string{"json", "yaml"} {
		out := u.must(t, ctx, "vfmigration", "status", "piped", "-o", format)
		var m v1alpha1.VFMigration
		check(t, yaml.UnmarshalStrict([]byte(out), &m))
		if format == "json" && !json.Valid([]byte(out)) || m.Kind != "VFMigration" || !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) || len(m.Status.Steps) == 0 {
			t.Errorf("-o %s: %s", format, out)
		}
	}

	w.aborted(t, ctx, u)

	// As kubectl completes its command line.
	for args, want := range map[string]string{"migrate": harness.VMI, "preflight": harness.VMI, "status": "by-hand"} {
		if got := strings.Split(u.must(t, ctx, "__complete", "vfmigration", args, ""), "\n"); !slices.Contains(got, want) {
			t.Errorf("%s is completed with %q, want %s among it", args, got, want)
		}
	}
	if got := strings.Split(u.must(t, ctx, "__complete", "vfmigration", "ab"), "\n"); len(got) == 0 || !strings.HasPrefix(got[0], "abort") {
		t.Errorf("ab is completed with %q", got)
	}
	w.shown(t, ctx, u)
}

// aborted: a migration that is aborted is undone, which its user is told, and counted.
func (w *world) aborted(t *testing.T, ctx context.Context, u *user) {
	t.Helper()
	before := w.scrape(t, "")
	m, release := w.held(t, ctx)
	if got := strings.Split(u.must(t, ctx, "__complete", "vfmigration", "abort", ""), "\n"); got[0] != m.Name {
		t.Errorf("abort is completed with %q, want only %s, which is under way", got, m.Name)
	}
	if got, want := u.must(t, ctx, "vfmigration", "abort", m.Name), "vfmigration.compsc.io/"+m.Name+" is to be undone\n"; got != want {
		t.Errorf("abort: %q, want %q", got, want)
	}
	release()
	check(t, w.h.AwaitEnd(ctx, m, nil))
	if m.Status.Failure == nil || m.Status.Failure.Reason != v1alpha1.ReasonAborted {
		t.Fatalf("aborted: %s", harness.Describe(m))
	}
	if status := u.must(t, ctx, "vfmigration", "status", m.Name); !strings.Contains(status, "\nFailure:       Aborted: ") || !strings.Contains(status, v1alpha1.ConditionRolledBack) {
		t.Errorf("the status of one that was aborted:\n%s", status)
	}
	u.refused(t, ctx, "has ended already: Failed", "vfmigration", "abort", m.Name)
	_, err := w.vm.CheckUndisturbed(ctx)
	check(t, err)
	after := w.scrape(t, "")
	for _, labels := range [][]string{{"vfmigration_total", "result", "failed"}, {"vfmigration_rollbacks_total", "result", "complete"}} {
		args := append(slices.Clone(labels[1:]), "reason", v1alpha1.ReasonAborted)
		if was, is := before.Value(ours+labels[0], args...), after.Value(ours+labels[0], args...); is != was+1 {
			t.Errorf("%s%q went from %v to %v when one was aborted", labels[0], args, was, is)
		}
	}
}

// shown: the README's example of each command has the form of what the command
// prints: the same columns, fields and rows.
func (w *world) shown(t *testing.T, ctx context.Context, u *user) {
	t.Helper()
	const example = "hop-1"
	readme, err := os.ReadFile(filepath.Join(filepath.Dir(w.set.Config), "README.md"))
	check(t, err)
	for _, test := range []struct {
		command string
		form    func(string) []string
	}{
		{"kubectl get vfm", columnsOf},
		{"kubectl get vfm -o wide", columnsOf},
		{"kubectl wait --for=condition=Succeeded vfm/" + example, func(s string) []string { return []string{strings.ReplaceAll(strings.TrimSpace(s), "by-hand", example)} }},
		{"kubectl vfmigration status " + example, accountOf},
		{"kubectl describe vfm " + example, fieldsOf},
	} {
		_, rest, ok := strings.Cut(string(readme), "\n    $ "+test.command+"\n")
		if !ok {
			t.Errorf("the README does not show %s", test.command)
			continue
		}
		var text strings.Builder
		for line := range strings.Lines(rest) {
			if line != "\n" && !strings.HasPrefix(line, "    ") || strings.HasPrefix(line, "    $ ") {
				break
			}
			text.WriteString(strings.TrimPrefix(line, "    "))
		}
		args := strings.Fields(strings.ReplaceAll(test.command, example, "by-hand"))[1:]
		got := u.must(t, ctx, args...)
		if diff := cmp.Diff(test.form(text.String()), test.form(got)); diff != "" {
			t.Errorf("%s: README (-) and what it prints (+):\n%s\nIt prints:\n%s", test.command, diff, got)
		}
	}
}

// gap is what stands between columns, whose names may have blanks.
var gap = regexp.MustCompile(`\s{2,}`)

// columnsOf is the header of a table.
func columnsOf(table string) []string {
	header, _, _ := strings.Cut(table, "\n")
	return gap.Split(strings.TrimSpace(header), -1)
}

// accountOf is the form of `kubectl vfmigration status`: what its first lines
// are called, the headers of its tables, and the conditions and steps in them.
func accountOf(text string) (form []string) {
	parts := strings.Split(strings.TrimSpace(text), "\n\n")
	for i, part := range parts {
		lines := strings.Split(part, "\n")
		if i == 0 {
			for _, l := range lines {
				name, _, _ := strings.Cut(l, ":")
				form = append(form, name)
			}
			continue
		}
		header := gap.Split(lines[0], -1)
		form = append(form, strings.Join(header, "|"))
		for _, l := range lines[1:] {
			switch row := gap.Split(l, -1); header[0] {
			case "AFTER":
				form = append(form, strings.Join(row[1:4], "|"))
			case "STEP":
				form = append(form, row[0])
			default:
				form = append(form, fmt.Sprint(len(row), " cells"))
			}
		}
	}
	return form
}

// field is a line of `kubectl describe` that names a field.
var field = regexp.MustCompile(`^(\s*)([A-Z][A-Za-z ]*):`)

// fieldsOf is the form of `kubectl describe`: its fields, what conditions and
// steps are about, and the events.
func fieldsOf(text string) (form []string) {
	events := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		switch m := field.FindStringSubmatch(line); {
		case events:
			if row := gap.Split(strings.TrimSpace(line), -1); len(row) > 1 {
				form = append(form, row[0]+"|"+row[1])
			}
		case m == nil:
		case m[2] == "Type" || m[2] == "Reason" || strings.Contains(line, "source/") || strings.Contains(line, "target/"):
			form = append(form, gap.ReplaceAllString(line, "  "))
		default:
			form = append(form, m[0])
			events = m[2] == "Events"
		}
	}
	return form
}
