package card

import (
	"errors"
	"io/fs"
	"os"
)

// Node is how a node is.
type Node struct {
	// VFs are those of its cards.
	VFs []State
	// Journal are the names of the files in the agent's journal.
	Journal []string
}

// Look looks at the node, whose agent keeps its journal in the directory.
func Look(journal string) (n Node, err error) {
	if n.VFs, err = States(); err != nil {
		return n, err
	}
	files, err := os.ReadDir(journal)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return n, err
	}
	for _, f := range files {
		n.Journal = append(n.Journal, f.Name())
	}
	return n, nil
}

// State is all that an administrator may change of a VF, and its driver.
type State struct {
	VF, MAC, Driver  string
	VLAN, QoS        int
	Spoofcheck       bool
	Trust, LinkState uint32
	MinRate, MaxRate uint32
}

// States returns those of all VFs of the node.
func States() ([]State, error) {
	cards, err := List()
	if err != nil {
		return nil, err
	}
	var all []State
	for _, c := range cards {
		vfs, err := c.VFs()
		if err != nil {
			return nil, err
		}
		link, err := c.Link()
		if err != nil {
			return nil, err
		}
		// A VF that was made or removed meanwhile is in one of the lists only.
		for i, set := range link.Attrs().Vfs[:min(len(vfs), len(link.Attrs().Vfs))] {
			driver, err := vfs[i].Driver()
			if err != nil {
				return nil, err
			}
			all = append(all, State{
				VF: vfs[i].Address, Driver: driver, MAC: set.Mac.String(), VLAN: set.Vlan, QoS: set.Qos,
				Spoofcheck: set.Spoofchk, Trust: set.Trust, LinkState: set.LinkState, MinRate: set.MinTxRate, MaxRate: set.MaxTxRate,
			})
		}
	}
	return all, nil
}
