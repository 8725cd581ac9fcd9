// Package precond stands in for kubevirt.io/client-go/precond, as far as the files
// taken from KubeVirt use it.
package precond

// MustNotBeEmpty panics for an empty text.
func MustNotBeEmpty(s string, _ ...any) string {
	if s == "" {
		panic("must not be empty")
	}
	return s
}
