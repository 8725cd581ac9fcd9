// Package helm runs Helm against one cluster, as a user of the chart does.
package helm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Release is the name of the chart's release in the tests.
const Release = "compsc"

// Helm is the program and what it works with. Its methods may be called
// concurrently, as far as Helm allows.
type Helm struct {
	// Program is the path of the program.
	Program string
	// Home is a directory for what Helm keeps: nothing of the user's is read,
	// nothing is left elsewhere.
	Home string
	// Kubeconfig names the cluster; empty for commands that need none.
	Kubeconfig string
}

// Run runs Helm and returns what it prints; its error has what it says.
func (h Helm) Run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, h.Program, args...)
	cmd.Env = []string{"HOME=" + h.Home, "PATH=" + os.Getenv("PATH"), "KUBECONFIG=" + h.Kubeconfig,
		"HELM_CACHE_HOME=" + filepath.Join(h.Home, "cache"), "HELM_CONFIG_HOME=" + filepath.Join(h.Home, "config"),
		"HELM_DATA_HOME=" + filepath.Join(h.Home, "data")}
	var out, say bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &say
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("helm %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(say.String()))
	}
	return out.String(), nil
}
