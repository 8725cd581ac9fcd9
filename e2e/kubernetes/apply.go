package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/e2e/wait"
)

// Apply makes the objects of a YAML stream what it says. Edit, if set, may
// change each before. An object whose kind is not known yet, because its
// definition was created just before, is waited for until ctx ends.
func (c *Cluster) Apply(ctx context.Context, manifest []byte, edit func(*unstructured.Unstructured) error) error {
	dec := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(manifest), 4096)
	for {
		u := &unstructured.Unstructured{}
		if err := dec.Decode(&u.Object); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if len(u.Object) == 0 {
			continue
		}
		if edit != nil {
			if err := edit(u); err != nil {
				return fmt.Errorf("%s %s: %w", u.GetKind(), u.GetName(), err)
			}
		}
		if err := c.ApplyObject(ctx, u); err != nil {
			return err
		}
	}
}

// ApplyObject is Apply for one object.
func (c *Cluster) ApplyObject(ctx context.Context, u *unstructured.Unstructured) error {
	var last error
	err := wait.Until(ctx, fmt.Sprintf("the API of %s", u.GroupVersionKind()), func(ctx context.Context) (bool, error) {
		last = c.Client.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner("e2e"), client.ForceOwnership)
		if meta.IsNoMatchError(last) {
			return false, nil
		}
		return true, last
	})
	if err != nil {
		return fmt.Errorf("%s %s: %w", u.GetKind(), u.GetName(), errors.Join(err, last))
	}
	return nil
}

// Until waits until ok returns true, an error, or ctx ends. It fails as well
// if one of the cluster's processes ends.
func (c *Cluster) Until(ctx context.Context, what string, ok func(context.Context) (bool, error)) error {
	return wait.Until(ctx, what, func(ctx context.Context) (bool, error) {
		if err := c.ended(); err != nil {
			return false, err
		}
		return ok(ctx)
	})
}
