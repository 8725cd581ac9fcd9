//go:build demo

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"

	"compsc.io/compsc/e2e/demo"
)

// The laboratory is not shipped: only builds with the tag demo have it, and
// only they can inject faults into the processes they start.
func init() {
	extras = append(extras, func(root *cobra.Command) {
		root.AddCommand(demo.Command())
		c, _, err := root.Find([]string{"device"})
		if err != nil {
			panic(err)
		}
		var fault string
		c.Flags().StringVar(&fault, "fault", "", "inject a fault: corrupt-state, no-marking, filters-taken")
		var marked string
		c.Flags().StringVar(&marked, "marked-pages", "", "directory for a file for each migration and interface, with the addresses of the pages that were marked")
		run := c.RunE
		c.RunE = func(cmd *cobra.Command, args []string) error {
			switch fault {
			case "":
			case "corrupt-state":
				deviceOptions.Faults.TamperState = func(b []byte) { b[len(b)/2] ^= 0x10 }
			case "no-marking":
				deviceOptions.Faults.SkipMarking = true
			case "filters-taken":
				deviceOptions.Faults.TakeFilters = true
			default:
				return fmt.Errorf("--fault: %q is not known", fault)
			}
			if marked != "" {
				deviceOptions.Marked = func(migration, iface string, pages []uint64) error {
					return writePages(filepath.Join(marked, migration+"-"+iface), pages)
				}
			}
			return run(cmd, args)
		}
	})
}

// writePages writes addresses, one a line, and not before all are there.
func writePages(path string, pages []uint64) error {
	var b []byte
	for _, addr := range pages {
		b = append(strconv.AppendUint(b, addr, 16), '\n')
	}
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
