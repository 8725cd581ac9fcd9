//go:build demo

package main

import (
	"fmt"

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
			return run(cmd, args)
		}
	})
}
