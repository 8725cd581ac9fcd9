package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// config is what the kernel's command line asks for.
type config struct {
	addresses []netip.Prefix // of the VFs, in the order of their PCI addresses
	mtu       int            // 0: leave the driver's
	port      string         // the serial port of the commands
}

func parseCmdline(cmdline string) (config, error) {
	c := config{port: "ttyS1"}
	for _, word := range strings.Fields(cmdline) {
		name, value, _ := strings.Cut(word, "=")
		switch name {
		case "compsc.ip":
			for _, s := range strings.Split(value, ",") {
				address, err := netip.ParsePrefix(s)
				if err != nil {
					return config{}, fmt.Errorf("kernel command line: %s: %w", word, err)
				}
				c.addresses = append(c.addresses, address)
			}
		case "compsc.mtu":
			mtu, err := strconv.Atoi(value)
			if err != nil || mtu < 68 || mtu > 65535 {
				return config{}, fmt.Errorf("kernel command line: %s: an MTU from 68 to 65535 is needed", word)
			}
			c.mtu = mtu
		case "compsc.port":
			if value != "ttyS0" && value != "ttyS1" {
				return config{}, fmt.Errorf("kernel command line: %s: ttyS0 or ttyS1 is needed", word)
			}
			c.port = value
		}
	}
	return c, nil
}
