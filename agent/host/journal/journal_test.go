package journal

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func entry() Entry {
	return Entry{Version: Version, VF: "0000:01:10.0", PF: "0000:01:00.0", Index: 0, Boot: "b", Node: 7, VFs: 2, Driver: "igbvf",
		Settings: Settings{MAC: "52:54:00:00:00:01", VLAN: 7, QoS: 3, Proto: 0x8100, SpoofCheck: true, MaxRate: 100, LinkState: 1}}
}

func TestJournal(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, err := j.Load("0000:01:10.0"); ok || err != nil {
		t.Fatalf("an entry that was never made (%v)", err)
	}
	e := entry()
	for _, driver := range []string{"igbvf", "vfio-pci"} {
		e.Driver = driver
		if err := j.Save(e); err != nil {
			t.Fatal(err)
		}
	}
	// A crash in the middle of writing leaves the entry of before.
	if err := os.WriteFile(filepath.Join(dir, e.VF+".json.new"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if j, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	got, ok, err := j.Load(e.VF)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	if d := cmp.Diff(e, got); d != "" {
		t.Errorf("entry (-want +got):\n%s", d)
	}
	if list, err := j.List(); err != nil || !cmp.Equal(list, []string{e.VF}) {
		t.Errorf("list %v (%v)", list, err)
	}
	for range 2 {
		if err := j.Remove(e.VF); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := j.List(); err != nil || len(list) > 0 {
		t.Errorf("list %v (%v)", list, err)
	}
}

func TestJournalRefuses(t *testing.T) {
	dir := t.TempDir()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []func(*Entry){
		func(e *Entry) { e.VF = "../x" },
		func(e *Entry) { e.PF = "" },
		func(e *Entry) { e.Driver = "../bind" },
		func(e *Entry) { e.Override = "a\nb" },
		func(e *Entry) { e.Settings.VLAN = 4095 },
		func(e *Entry) { e.Settings.LinkState = 3 },
		func(e *Entry) { e.Index = -1 },
	} {
		e := entry()
		change(&e)
		if err := j.Save(e); err == nil {
			t.Errorf("saved %+v", e)
		}
	}
	for text, want := range map[string]string{
		"":                         "EOF",
		"{":                        "unexpected end",
		`{"version":2}`:            "another release",
		`{"version":1}`:            "want PCI addresses",
		`{"version":1,"colour":1}`: "unknown field",
		`{"version":1,"vf":"0000:01:10.2","pf":"0000:01:00.0"}`: "about VF 0000:01:10.2",
		strings.Repeat(" ", maxFile+1):                          "more than",
	} {
		if err := os.WriteFile(filepath.Join(dir, "0000:01:10.0.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, ok, err := j.Load("0000:01:10.0"); ok || err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "by hand") {
			t.Errorf("%.30q: %v, want %q in it", text, err, want)
		}
	}
	if _, _, err := j.Load("passwd"); err == nil {
		t.Error("loaded what is no VF")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":1,"vf":"0000:01:10.2","pf":"0000:01:00.0","driver":"igbvf","settings":{"mac":"x","vlan":7}}`))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decode(b)
		if err == nil && e.validate() != nil {
			t.Errorf("decoded %+v", e)
		}
	})
}
