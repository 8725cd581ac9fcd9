// Gendocs writes the reference pages of the metrics and of the conditions to
// the directory named by its argument. It reads the source of the packages,
// in whose tree it must be run: the literals that make the metrics, and the
// documented constants of the API.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Where the metrics, and where the conditions and reasons, are defined.
var (
	metricDirs    = []string{".", "controllers", "agent"}
	conditionDirs = []string{"api/v1alpha1", "agent/kubevirt/cluster"}
)

func main() {
	if err := run(".", os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "gendocs:", err)
		os.Exit(1)
	}
}

// run reads the tree at root, to which the directory in args is relative.
func run(root string, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("usage: gendocs DIRECTORY")
	}
	dir := filepath.Join(root, args[0])
	metrics, err := metricsOf(root, metricDirs)
	if err != nil {
		return err
	}
	constants, err := constantsOf(root, conditionDirs)
	if err != nil {
		return err
	}
	conditions, err := conditionsPage(constants)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, page := range map[string]string{"metrics.md": metricsPage(metrics), "conditions.md": conditions} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(page), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// cell makes text fit for a cell of a table.
func cell(text string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", `\|`)
}
