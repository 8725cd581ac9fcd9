//go:build e2esriov

package tests

import (
	"fmt"
	"os"
	"testing"

	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/node"
)

// vfsPerCard is as many as Linux's igb driver allows.
const vfsPerCard = 7

// cards are the node's cards, vfs their VFs.
var (
	cards []card.PF
	vfs   [][]card.VF
)

func TestMain(m *testing.M) {
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "the node's cards:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func setUp() (err error) {
	if cards, err = card.List(); err != nil {
		return err
	}
	if len(cards) != node.PFs {
		return fmt.Errorf("there are %d, want %d", len(cards), node.PFs)
	}
	for _, c := range cards {
		if err := c.Up(); err != nil {
			return err
		}
		made, err := c.MakeVFs(vfsPerCard)
		if err != nil {
			return err
		}
		vfs = append(vfs, made)
	}
	return nil
}
