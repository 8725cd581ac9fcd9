//go:build apiserver

package controllers

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"

	"compsc.io/compsc/api/v1alpha1"
)

type object = map[string]any

func vfMigration(name string, spec object) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: object{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": "VFMigration",
		"metadata": object{"namespace": "default", "name": name}, "spec": spec,
	}}
}

func selector(n int) object {
	s := object{}
	for i := range n {
		s[strings.Repeat("k", i+1)] = "v"
	}
	return s
}

func TestCreateRules(t *testing.T) {
	many := make([]any, 9)
	for i := range many {
		many[i] = strings.Repeat("i", i+1)
	}
	timeouts := func(name, value string) object {
		return object{"vmiName": "vm", "timeouts": object{name: value}}
	}
	for name, tc := range map[string]struct {
		spec object
		want string // part of the refusal, empty when it is to be accepted
	}{
		"least":                     {object{"vmiName": "vm"}, ""},
		"all":                       {object{"vmiName": "vm", "interfaces": []any{"a", "b"}, "target": object{"nodeName": "n"}, "abort": true, "timeouts": object{"prepare": "5s", "migrate": "24h", "hold": "500ms"}}, ""},
		"largest selector":          {object{"vmiName": "vm", "target": object{"nodeSelector": selector(16)}}, ""},
		"no vmiName":                {object{}, "spec.vmiName: Required value"},
		"empty vmiName":             {object{"vmiName": ""}, "spec.vmiName"},
		"long vmiName":              {object{"vmiName": strings.Repeat("v", 254)}, "spec.vmiName: Too long"},
		"empty interface":           {object{"vmiName": "vm", "interfaces": []any{""}}, "spec.interfaces[0]"},
		"long interface":            {object{"vmiName": "vm", "interfaces": []any{strings.Repeat("i", 64)}}, "spec.interfaces[0]: Too long"},
		"interface twice":           {object{"vmiName": "vm", "interfaces": []any{"a", "a"}}, "Duplicate value"},
		"too many interfaces":       {object{"vmiName": "vm", "interfaces": many}, "spec.interfaces: Too many"},
		"empty target":              {object{"vmiName": "vm", "target": object{}}, "exactly one of nodeName and nodeSelector must be set"},
		"two targets":               {object{"vmiName": "vm", "target": object{"nodeName": "n", "nodeSelector": selector(1)}}, "exactly one of nodeName and nodeSelector must be set"},
		"empty selector":            {object{"vmiName": "vm", "target": object{"nodeSelector": object{}}}, "spec.target.nodeSelector"},
		"large selector":            {object{"vmiName": "vm", "target": object{"nodeSelector": selector(17)}}, "spec.target.nodeSelector: Too many"},
		"prepare too short":         {timeouts("prepare", "4s"), "must be between 5s and 1h"},
		"prepare too long":          {timeouts("prepare", "61m"), "must be between 5s and 1h"},
		"migrate too short":         {timeouts("migrate", "4999ms"), "must be between 5s and 24h"},
		"migrate too long":          {timeouts("migrate", "24h1s"), "must be between 5s and 24h"},
		"hold too short":            {timeouts("hold", "499ms"), "must be between 500ms and 10s"},
		"hold too long":             {timeouts("hold", "11s"), "must be between 500ms and 10s"},
		"hold is no duration":       {timeouts("hold", "soon"), "spec.timeouts.hold"},
		"hold is beyond any number": {timeouts("hold", strings.Repeat("9", 200)+"s"), "spec.timeouts.hold"},
	} {
		t.Run(name, func(t *testing.T) {
			err := admin.Create(t.Context(), vfMigration("rules", tc.spec), client.DryRunAll)
			check(t, err, tc.want)
		})
	}
}

// check compares a refusal with what it must say.
func check(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil {
		t.Errorf("refused: %v", err)
	}
	if want != "" && (!apierrors.IsInvalid(err) || !strings.Contains(err.Error(), want)) {
		t.Errorf("error %v, want one with %q", err, want)
	}
}

func TestUpdateRules(t *testing.T) {
	base := func() object {
		return object{"vmiName": "vm", "interfaces": []any{"a"}, "target": object{"nodeName": "n"}}
	}
	for name, tc := range map[string]struct {
		from, to func(object)
		want     string
	}{
		"timeouts":             {nil, func(s object) { s["timeouts"] = object{"migrate": "1h"} }, ""},
		"abort":                {nil, func(s object) { s["abort"] = true }, ""},
		"abort again":          {func(s object) { s["abort"] = true }, func(s object) { s["timeouts"] = object{"migrate": "1h"} }, ""},
		"abort taken back":     {func(s object) { s["abort"] = true }, func(s object) { s["abort"] = false }, "abort cannot be taken back"},
		"abort removed":        {func(s object) { s["abort"] = true }, func(s object) { delete(s, "abort") }, "abort cannot be taken back"},
		"vmiName":              {nil, func(s object) { s["vmiName"] = "vm2" }, "vmiName is immutable"},
		"interfaces":           {nil, func(s object) { s["interfaces"] = []any{"b"} }, "interfaces is immutable"},
		"interfaces removed":   {nil, func(s object) { delete(s, "interfaces") }, "interfaces is immutable"},
		"interfaces added":     {func(s object) { delete(s, "interfaces") }, func(s object) { s["interfaces"] = []any{"b"} }, "interfaces is immutable"},
		"target":               {nil, func(s object) { s["target"] = object{"nodeName": "m"} }, "target is immutable"},
		"target of other kind": {nil, func(s object) { s["target"] = object{"nodeSelector": selector(1)} }, "target is immutable"},
		"target removed":       {nil, func(s object) { delete(s, "target") }, "target is immutable"},
		"target added":         {func(s object) { delete(s, "target") }, func(s object) { s["target"] = object{"nodeName": "m"} }, "target is immutable"},
		"nodeSelector of target": {func(s object) { s["target"] = object{"nodeSelector": selector(1)} },
			func(s object) { s["target"] = object{"nodeSelector": selector(2)} }, "target is immutable"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := base()
			if tc.from != nil {
				tc.from(spec)
			}
			m := vfMigration("update-rules", spec)
			if err := admin.Create(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := admin.Delete(context.Background(), m); err != nil { // t.Context() has ended
					t.Error(err)
				}
			})
			tc.to(m.Object["spec"].(object))
			check(t, admin.Update(t.Context(), m, client.DryRunAll), tc.want)
		})
	}
}

func TestDefaults(t *testing.T) {
	for name, spec := range map[string]object{
		"no timeouts": {"vmiName": "vm"},
		"one timeout": {"vmiName": "vm", "timeouts": object{"hold": "5s"}},
	} {
		t.Run(name, func(t *testing.T) {
			u := vfMigration("defaults", spec)
			if err := admin.Create(t.Context(), u, client.DryRunAll); err != nil {
				t.Fatal(err)
			}
			want := object{"prepare": "3m", "migrate": "15m", "hold": "5s"}
			if diff := cmp.Diff(want, u.Object["spec"].(object)["timeouts"]); diff != "" {
				t.Errorf("timeouts (-want +got):\n%s", diff)
			}
			raw, err := json.Marshal(u)
			if err != nil {
				t.Fatal(err)
			}
			var m v1alpha1.VFMigration
			if err := json.Unmarshal(raw, &m); err != nil {
				t.Fatal(err)
			}
			var none v1alpha1.VFMigrationTimeouts
			got := &m.Spec.Timeouts
			if got.PrepareTimeout() != none.PrepareTimeout() || got.MigrateTimeout() != none.MigrateTimeout() || got.HoldTimeout() != none.HoldTimeout() {
				t.Errorf("the API server's defaults %+v are not the package's", got)
			}
		})
	}
}

// restClient reaches the API server without any type's help.
func restClient(t *testing.T) *rest.RESTClient {
	t.Helper()
	config := rest.CopyConfig(adminConfig)
	config.NegotiatedSerializer = serializer.NewCodecFactory(admin.Scheme())
	c, err := rest.UnversionedRESTClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// table asks the API server for what kubectl get prints.
func table(t *testing.T, obj client.Object) (header, wide, row []string) {
	t.Helper()
	gvk, err := apiutil.GVKForObject(obj, admin.Scheme())
	if err != nil {
		t.Fatal(err)
	}
	mapping, err := admin.RESTMapper().RESTMapping(gvk.GroupKind(), gvk.Version)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := restClient(t).Get().AbsPath("/apis", gvk.Group, gvk.Version).
		NamespaceIfScoped(obj.GetNamespace(), obj.GetNamespace() != "").Resource(mapping.Resource.Resource).Name(obj.GetName()).
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out metav1.Table
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	for i, col := range out.ColumnDefinitions {
		if col.Priority == 0 {
			header = append(header, col.Name)
		} else {
			wide = append(wide, col.Name)
		}
		if s, ok := out.Rows[0].Cells[i].(string); ok && col.Name != "Age" {
			row = append(row, s)
		}
	}
	return header, wide, row
}

func TestPrinterColumns(t *testing.T) {
	m := &v1alpha1.VFMigration{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "columns"}, Spec: v1alpha1.VFMigrationSpec{VMIName: "vm"}}
	if err := admin.Create(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	m.Status = v1alpha1.VFMigrationStatus{
		Phase:        v1alpha1.PhaseSucceeded,
		Source:       &v1alpha1.VFMigrationEndpoint{NodeName: "node-a"},
		Target:       &v1alpha1.VFMigrationEndpoint{NodeName: "node-b"},
		MigrationRef: &v1alpha1.MigrationReference{Name: "columns", UID: "u"},
		Downtime: &v1alpha1.Downtime{
			VMStopped: metav1.Duration{Duration: 180 * time.Millisecond}, DeviceStopped: metav1.Duration{Duration: 90 * time.Millisecond},
		},
		Devices: []v1alpha1.DeviceStatus{{
			Interface: "fast", Source: &v1alpha1.VFReference{VF: "0000:01:10.0"},
			Target: &v1alpha1.VFReference{VF: "0000:01:10.2", MAC: "52:54:00:00:00:01"},
		}},
	}
	setCondition(&m.Status, v1alpha1.ConditionSucceeded, metav1.ConditionTrue, "Succeeded", "", 0)
	if err := admin.Status().Update(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	header, wide, row := table(t, m)
	for _, tc := range []struct{ got, want []string }{
		{header, []string{"Name", "VMI", "Phase", "Source", "Target", "Succeeded", "Reason", "VM stopped", "Age"}},
		{wide, []string{"Device stopped", "MAC", "Source VF", "Target VF", "Migration"}},
		{row, []string{"columns", "vm", "Succeeded", "node-a", "node-b", "True", "Succeeded", "180ms",
			"90ms", "52:54:00:00:00:01", "0000:01:10.0", "0000:01:10.2", "columns"}},
	} {
		if diff := cmp.Diff(tc.want, tc.got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}

	n := &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: "columns"}}
	if err := admin.Create(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	n.Status = v1alpha1.VFNodeStatus{
		PeerAddress: "10.0.0.1:7443", AgentVersion: "v1", PFs: []v1alpha1.PFStatus{{Name: "pf0", Backend: "model"}},
		Conditions: []metav1.Condition{{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: "Ready", LastTransitionTime: at(0)}},
	}
	if err := admin.Status().Update(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	header, wide, row = table(t, n)
	for _, tc := range []struct{ got, want []string }{
		{header, []string{"Name", "Ready", "PFs", "Peer", "Age"}},
		{wide, []string{"Version"}},
		{row, []string{"columns", "True", "pf0", "10.0.0.1:7443", "v1"}},
	} {
		if diff := cmp.Diff(tc.want, tc.got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
}

// The names by which people reach the objects.
func TestNames(t *testing.T) {
	raw, err := restClient(t).Get().AbsPath("/apis", v1alpha1.GroupVersion.Group, v1alpha1.GroupVersion.Version).DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var list metav1.APIResourceList
	if err := json.Unmarshal(raw, &list); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, r := range list.APIResources {
		if len(r.ShortNames) == 1 && len(r.Categories) == 1 {
			got[r.Name] = r.ShortNames[0] + " " + r.Categories[0]
			if want := r.Name == "vfmigrations"; r.Namespaced != want {
				t.Errorf("%s namespaced: %t", r.Name, r.Namespaced)
			}
		}
	}
	if diff := cmp.Diff(map[string]string{"vfmigrations": "vfm compsc", "vfnodes": "vfn compsc"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
