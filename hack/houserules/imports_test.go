// Package houserules checks rules of the project that the compiler does not
// know: which package may import which. A new package needs a rule, so that
// its place is decided when it is made.
package houserules

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "compsc.io/compsc"

// rule says what a package may import.
type rule struct {
	// pkg is a path below the module; "..." at the end stands for everything
	// below too. The first rule that matches a package is its rule.
	pkg string
	// may are patterns like pkg, of the project's packages that it may import.
	may []string
}

// rules are the project's layers, from the top down.
var rules = []rule{
	{"", []string{"api/...", "controllers/...", "agent/..."}}, // main
	{"controllers", []string{"api/...", "agent/certs", "agent/kubevirt/...", "agent/protocol", "controllers/authority"}},
	{"controllers/kubectl", []string{"api/...", "controllers", "agent/kubevirt/..."}},
	{"controllers/binding", []string{"agent/kubevirt"}},
	{"controllers/authority", []string{"agent/certs", "agent/spiffe"}},
	{"agent", []string{"api/...", "agent/certs", "agent/device/controlpb", "agent/device/handoff", "agent/host", "agent/kubelet", "agent/kubevirt/...", "agent/peer/...", "agent/protocol", "agent/spiffe"}},
	{"agent/peer/...", []string{"agent/peer/...", "agent/device/controlpb", "agent/spiffe"}},
	{"agent/spiffe", nil},
	{"agent/certs", nil},
	{"agent/host/...", []string{"agent/host/...", "agent/vfio"}},
	{"agent/kubevirt/domain", nil},
	{"agent/kubevirt/nodehook/hookpb", nil},
	{"agent/kubelet/...", nil},
	{"agent/kubevirt/...", []string{"api/...", "agent/kubevirt/..."}},
	{"agent/device/controlpb", nil},
	{"agent/device/handoff", nil},
	{"agent/device/...", []string{"agent/device/...", "agent/compsc", "agent/family/...", "agent/gate", "agent/model", "agent/protocol", "agent/qemu", "agent/vfiouser", "agent/vfio"}},
	{"agent/model/...", []string{"agent/model/...", "agent/family/..."}},
	{"agent/compsc/statepb", nil},
	{"agent/compsc/...", []string{"agent/compsc/...", "agent/family"}},
	{"agent/family", nil},
	{"agent/privilege", nil},
	{"agent/protocol", nil},
	{"agent/family/intel", []string{"agent/family"}},
	{"agent/family/...", []string{"agent/family", "agent/family/intel"}},
	{"agent/vfiouser/...", nil},
	{"agent/gate/...", nil},
	{"agent/qemu/...", nil},
	{"agent/vfio/...", nil},
	{"api/...", []string{"api/..."}},
	{"e2e/twin", []string{"agent/compsc", "agent/family/...", "agent/model"}},
	{"e2e/...", []string{"api/...", "controllers/...", "agent/...", "e2e/..."}},
	{"hack/genregs", []string{"agent/family/..."}},
	{"hack/...", nil},
}

// owned are modules of others that only some of the project's packages may
// import: what they do is to happen in one place.
var owned = []rule{
	{"github.com/vishvananda/...", []string{"agent/host/...", "e2e/..."}},
	{"github.com/digitalocean/go-qemu/...", []string{"agent/qemu/...", "e2e/..."}},
	{"libvirt.org/...", []string{"agent/kubevirt/domain", "e2e/..."}},
	{"kubevirt.io/...", []string{"", "agent", "agent/kubevirt/...", "controllers/...", "e2e/..."}},
	// Alpha APIs, which change with KubeVirt's releases.
	{"kubevirt.io/api/plugin/...", []string{"agent/kubevirt/nodehook"}},
	{"kubevirt.io/api/migrations/...", []string{"agent/kubevirt/cluster"}},
	{"sigs.k8s.io/controller-runtime/...", []string{"", "agent", "agent/kubevirt/cluster", "api/...", "controllers/...", "e2e/..."}},
}

// goPackage is what the test reads of `go list -json`.
type goPackage struct {
	ImportPath string
	Imports    []string
}

func matches(pattern, path string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == prefix || strings.HasPrefix(path, prefix+"/")
	}
	return path == pattern
}

func matchesAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, path) })
}

// below returns the path of a package below the module, and whether it is there.
func below(path string) (string, bool) {
	if path == module {
		return "", true
	}
	return strings.CutPrefix(path, module+"/")
}

// violations returns what is wrong with the imports of packages. Demo says
// that they were listed with the build tag demo, with which main may use e2e.
func violations(packages []goPackage, demo bool) []string {
	var wrong []string
	for _, p := range packages {
		path, _ := below(p.ImportPath)
		i := slices.IndexFunc(rules, func(r rule) bool { return matches(r.pkg, path) })
		if i < 0 {
			wrong = append(wrong, fmt.Sprintf("%s: there is no rule for this package; add one to the table of hack/houserules", path))
			continue
		}
		may := rules[i].may
		if path == "" && demo {
			may = append(slices.Clone(may), "e2e/...")
		}
		for _, imported := range p.Imports {
			if own, ok := below(imported); ok {
				if !matchesAny(may, own) {
					wrong = append(wrong, fmt.Sprintf("%q imports %s, which its rule does not allow", path, own))
				}
				continue
			}
			for _, o := range owned {
				if matches(o.pkg, imported) && !matchesAny(o.may, path) {
					wrong = append(wrong, fmt.Sprintf("%q imports %s, which only %q may", path, imported, o.may))
				}
			}
		}
	}
	return wrong
}

// list returns the project's packages as they are built with the tags. The
// imports of tests are not among what it lists.
func list(t *testing.T, tags string) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-tags", tags, "-json=ImportPath,Imports", module+"/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var packages []goPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		switch err := d.Decode(&p); {
		case errors.Is(err, io.EOF):
			return packages
		case err != nil:
			t.Fatalf("go list: %v", err)
		}
		packages = append(packages, p)
	}
}

func TestImports(t *testing.T) {
	for tags, demo := range map[string]bool{"": false, "demo": true} {
		packages := list(t, tags)
		if len(packages) < 10 {
			t.Fatalf("go list found only %d packages", len(packages))
		}
		for _, v := range violations(packages, demo) {
			t.Errorf("tags %q: %s", tags, v)
		}
	}
}

func TestViolationsAreFound(t *testing.T) {
	tests := []struct {
		path    string
		imports string
		demo    bool
		wrong   bool
	}{
		{"", "compsc.io/compsc/agent/device", false, false},
		{"", "compsc.io/compsc/e2e/lab", false, true},
		{"", "compsc.io/compsc/e2e/lab", true, false},
		{"/agent/device", "compsc.io/compsc/e2e/lab", true, true},
		{"/agent/device", "compsc.io/compsc/agent/model", false, false},
		{"/agent/device", "compsc.io/compsc/agent/host", false, true},
		{"/agent", "compsc.io/compsc/agent/device", false, true},
		{"/agent", "compsc.io/compsc/agent/model", false, true},
		{"/agent/compsc", "compsc.io/compsc/agent/model", false, true},
		{"/agent/compsc", "compsc.io/compsc/agent/family/ixgbevf", false, true},
		{"/agent/family", "compsc.io/compsc/agent/compsc", false, true},
		{"/agent/family/ixgbevf", "compsc.io/compsc/agent/family", false, false},
		{"/agent/vfiouser", "compsc.io/compsc/api/v1alpha1", false, true},
		{"/controllers", "compsc.io/compsc/agent/peer", false, true},
		{"/agent/new", "fmt", false, true},
		{"/agent/device", "github.com/vishvananda/netlink", false, true},
		{"/agent/host", "github.com/vishvananda/netlink", false, false},
		{"/agent/device", "kubevirt.io/api/core/v1", false, true},
		{"/agent", "kubevirt.io/api/core/v1", false, false},
		{"/agent", "kubevirt.io/api/plugin/v1alpha1", false, true},
		{"/agent/kubevirt/cluster", "kubevirt.io/api/plugin/v1alpha1", false, true},
		{"/agent/kubevirt/nodehook", "kubevirt.io/api/plugin/v1alpha1", false, false},
	}
	for _, test := range tests {
		p := goPackage{ImportPath: module + test.path, Imports: []string{test.imports}}
		got := violations([]goPackage{p}, test.demo)
		if (len(got) > 0) != test.wrong {
			t.Errorf("%s importing %s (demo %v): violations %v, want some: %v", p.ImportPath, test.imports, test.demo, got, test.wrong)
		}
	}
}

func TestPatterns(t *testing.T) {
	got := map[string]bool{}
	for _, path := range []string{"agent", "agent/a", "agent/a/b", "agents"} {
		got[path] = matches("agent/...", path)
	}
	want := map[string]bool{"agent": true, "agent/a": true, "agent/a/b": true, "agents": false}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("matches of agent/... (-want +got):\n%s", diff)
	}
}
