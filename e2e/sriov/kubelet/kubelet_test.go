package kubelet

import (
	"os"
	"path/filepath"
	"testing"

	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"
)

func TestList(t *testing.T) {
	l := &lister{file: filepath.Join(t.TempDir(), "pods")}
	list := func() []*podresources.PodResources {
		t.Helper()
		r, err := l.List(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return r.PodResources
	}
	if got := list(); len(got) != 0 {
		t.Errorf("before there is a pod: %v", got)
	}
	if err := os.WriteFile(l.file, []byte(`[{"Namespace":"n","Name":"p","Container":"c","Resource":"r","Devices":["0000:01:10.0"]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	got := list()
	if len(got) != 1 || got[0].Namespace != "n" || got[0].Name != "p" || len(got[0].Containers) != 1 {
		t.Fatalf("pods %v", got)
	}
	d := got[0].Containers[0].Devices
	if len(d) != 1 || d[0].ResourceName != "r" || len(d[0].DeviceIds) != 1 || d[0].DeviceIds[0] != "0000:01:10.0" {
		t.Errorf("devices %v", d)
	}
}
