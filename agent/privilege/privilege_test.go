package privilege

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// inChild has the test's program restrict itself and print what it may still.
const inChild = "PRIVILEGE_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(inChild) == "" {
		os.Exit(m.Run())
	}
	if err := Restrict(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if os.Args[len(os.Args)-1] != "an argument" {
		fmt.Println("the arguments are", os.Args)
		os.Exit(1)
	}
	threads, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		panic(err)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			panic(err)
		}
		os.Stdout.Write(b)
	}
}

// TestRestrict: the process goes on, with the capabilities that are kept and no
// means to get others.
func TestRestrict(t *testing.T) {
	eff, err := effective()
	if err != nil {
		t.Fatal(err)
	}
	may := eff&(1<<unix.CAP_SETPCAP) != 0
	cmd := exec.CommandContext(t.Context(), os.Args[0], "an argument")
	cmd.Env = append(os.Environ(), inChild+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	seen := map[string]int{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		if !strings.HasPrefix(name, "Cap") {
			continue
		}
		bits, err := strconv.ParseUint(value, 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		seen[name]++
		want := kept()
		switch {
		case name == "CapInh", name == "CapAmb":
			want = 0
		case name == "CapBnd" && !may:
			continue // nobody else may lower it
		}
		if set(bits)&^want != 0 {
			t.Errorf("%s is %x, at most %x wanted", name, bits, want)
		}
		if may && (name == "CapEff" || name == "CapPrm") && set(bits) != eff&want {
			t.Errorf("%s is %x: of %x it was to keep %x", name, bits, eff, want)
		}
	}
	for _, name := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if seen[name] == 0 {
			t.Errorf("the child did not say its %s:\n%s", name, out)
		}
	}
}

// TestDocumented: docs/security.md has the same table.
func TestDocumented(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(b), "| Capability of the agent | For |\n|---|---|\n")
	if !found {
		t.Fatal("docs/security.md has no table of capabilities")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	want := ""
	for _, c := range Kept {
		want += "| `" + c.Name + "` | " + c.For + " |\n"
	}
	if got := table + "\n"; got != want {
		t.Errorf("docs/security.md has\n%s\nthe program keeps\n%s", got, want)
	}
}
