package cluster

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	virtv1 "kubevirt.io/api/core/v1"
	migrationsv1alpha1 "kubevirt.io/api/migrations/v1alpha1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// PostCopy tells whether KubeVirt would allow a migration of the VMI that starts
// now to end by post-copy, and says which object allows it. It resolves the
// configuration as virt-controller 1.9 does (pkg/virt-controller/watch/migration,
// resolveMigrationConfig): the KubeVirt object's, overridden by the
// MigrationPolicy that fits best.
func PostCopy(ctx context.Context, r client.Reader, vmi *virtv1.VirtualMachineInstance) (allowed bool, by string, err error) {
	kv, err := kubeVirt(ctx, r)
	if err != nil {
		return false, "", err
	}
	if kv != nil {
		if m := kv.Spec.Configuration.MigrationConfiguration; m != nil && m.AllowPostCopy != nil {
			allowed, by = *m.AllowPostCopy, fmt.Sprintf("KubeVirt %s/%s (spec.configuration.migrations)", kv.Namespace, kv.Name)
		}
	}
	var list migrationsv1alpha1.MigrationPolicyList
	if err := r.List(ctx, &list); err != nil {
		if absent(err) {
			return allowed, by, nil
		}
		return false, "", fmt.Errorf("list MigrationPolicies: %w", err)
	}
	if len(list.Items) == 0 {
		return allowed, by, nil
	}
	ns := &corev1.Namespace{}
	if err := r.Get(ctx, client.ObjectKey{Name: vmi.Namespace}, ns); err != nil {
		return false, "", fmt.Errorf("read Namespace %s: %w", vmi.Namespace, err)
	}
	if p := bestPolicy(list.Items, vmi.Labels, ns.Labels); p != nil && p.Spec.AllowPostCopy != nil {
		allowed, by = *p.Spec.AllowPostCopy, "MigrationPolicy "+p.Name
	}
	return allowed, by, nil
}

// fit is how well a policy fits a VMI: by how many labels of each.
type fit struct{ namespace, vmi int }

func (f fit) better(than fit) bool {
	if a, b := f.namespace+f.vmi, than.namespace+than.vmi; a != b {
		return a > b
	}
	return f.vmi > than.vmi
}

// bestPolicy returns the policy that KubeVirt applies: of those whose selectors
// all match, the one with the most labels, those of the VMI counting more, and
// the first by name among equals. As in KubeVirt, a VMI without any label matches
// every selector.
func bestPolicy(policies []migrationsv1alpha1.MigrationPolicy, vmi, namespace map[string]string) *migrationsv1alpha1.MigrationPolicy {
	var best *migrationsv1alpha1.MigrationPolicy
	var bestFit fit
	for i := range policies {
		p := &policies[i]
		if p.Spec.Selectors == nil {
			continue
		}
		var f fit
		if vmi != nil {
			if !matches(p.Spec.Selectors.VirtualMachineInstanceSelector, vmi) || !matches(p.Spec.Selectors.NamespaceSelector, namespace) {
				continue
			}
			f = fit{len(p.Spec.Selectors.NamespaceSelector), len(p.Spec.Selectors.VirtualMachineInstanceSelector)}
		}
		if best == nil || f.better(bestFit) || f == bestFit && p.Name < best.Name {
			best, bestFit = p, f
		}
	}
	return best
}

func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
