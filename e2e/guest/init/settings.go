package main

import (
	"fmt"

	"github.com/safchain/ethtool"

	"compsc.io/compsc/e2e/guest/proto"
)

// withEthtool calls do with an open ethtool socket.
func withEthtool(do func(*ethtool.Ethtool) error) error {
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer tool.Close()
	return do(tool)
}

// setRing sets the numbers of descriptors of all of the interface's rings.
func setRing(name string, rx, tx int) error {
	return withEthtool(func(tool *ethtool.Ethtool) error {
		ring, err := tool.GetRing(name)
		if err != nil {
			return err
		}
		if rx < 1 || rx > int(ring.RxMaxPending) || tx < 1 || tx > int(ring.TxMaxPending) {
			return fmt.Errorf("rings of %d and %d descriptors: at most %d and %d", rx, tx, ring.RxMaxPending, ring.TxMaxPending)
		}
		ring.RxPending, ring.TxPending = uint32(rx), uint32(tx)
		_, err = tool.SetRing(name, ring)
		return err
	})
}

// setCoalesce sets rx-usecs.
func setCoalesce(name string, usecs int) error {
	return withEthtool(func(tool *ethtool.Ethtool) error {
		coalesce, err := tool.GetCoalesce(name)
		if err != nil {
			return err
		}
		coalesce.RxCoalesceUsecs = uint32(usecs)
		_, err = tool.SetCoalesce(name, coalesce)
		return err
	})
}

// setFeature turns a feature on or off. The kernel passes over what cannot be
// changed.
func setFeature(name, feature string, on bool) error {
	return withEthtool(func(tool *ethtool.Ethtool) error {
		if err := tool.Change(name, map[string]bool{feature: on}); err != nil {
			return err
		}
		features, err := tool.Features(name)
		if err != nil {
			return err
		}
		if features[feature] != on {
			return fmt.Errorf("%s stays %v", feature, !on)
		}
		return nil
	})
}

// settings reads what the setters above set.
func settings(name string) (*proto.Settings, error) {
	s := &proto.Settings{Features: map[string]bool{}, Fixed: map[string]bool{}}
	return s, withEthtool(func(tool *ethtool.Ethtool) error {
		ring, err := tool.GetRing(name)
		if err != nil {
			return err
		}
		coalesce, err := tool.GetCoalesce(name)
		if err != nil {
			return err
		}
		s.RX, s.TX, s.Usecs = int(ring.RxPending), int(ring.TxPending), int(coalesce.RxCoalesceUsecs)
		features, err := tool.FeaturesWithState(name)
		if err != nil {
			return err
		}
		for feature, state := range features {
			if state.Active {
				s.Features[feature] = true
			}
			if !state.Available || state.NeverChanged {
				s.Fixed[feature] = true
			}
		}
		return nil
	})
}
