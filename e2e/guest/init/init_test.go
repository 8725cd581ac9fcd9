package main

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseCmdline(t *testing.T) {
	address := netip.MustParsePrefix
	tests := []struct {
		cmdline string
		want    config
		fails   bool
	}{
		{"console=ttyS0 quiet\n", config{port: "ttyS1"}, false},
		{"a compsc.ip=192.0.2.10/24 compsc.mtu=9000", config{[]netip.Prefix{address("192.0.2.10/24")}, 9000, "ttyS1"}, false},
		{"compsc.ip=192.0.2.10/24,2001:db8::1/64", config{[]netip.Prefix{address("192.0.2.10/24"), address("2001:db8::1/64")}, 0, "ttyS1"}, false},
		{"console=tty0 compsc.port=ttyS0", config{port: "ttyS0"}, false},
		{"compsc.port=../mem", config{}, true},
		{"compsc.ip=192.0.2.10", config{}, true},
		{"compsc.ip=", config{}, true},
		{"compsc.mtu=10", config{}, true},
		{"compsc.mtu=big", config{}, true},
	}
	for _, test := range tests {
		got, err := parseCmdline(test.cmdline)
		if (err != nil) != test.fails {
			t.Errorf("%q: error %v, want one: %v", test.cmdline, err, test.fails)
		}
		if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(config{}), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%q (-want +got):\n%s", test.cmdline, diff)
		}
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("quiet compsc.ip=192.0.2.10/24,2001:db8::1/64 compsc.mtu=1500")
	f.Fuzz(func(t *testing.T, cmdline string) {
		c, err := parseCmdline(cmdline)
		if err != nil {
			return
		}
		for _, a := range c.addresses {
			if !a.IsValid() {
				t.Errorf("%q: address %v", cmdline, a)
			}
		}
	})
}

func TestResetSign(t *testing.T) {
	tests := map[string]bool{
		"4,500,2,-;ixgbevf 0000:00:05.0: NIC Link is Down\n SUBSYSTEM=pci\n":                 true,
		"3,501,2,-;ixgbevf: Detected Tx Unit Hang\n":                                         true,
		"4,502,2,-;NETDEV WATCHDOG: eth0 (ixgbevf): transmit queue 0 timed out\n":            true,
		"3,503,2,-;ixgbevf 0000:00:05.0: PF still resetting\n":                               true,
		"6,504,2,-;ixgbevf 0000:00:05.0: NIC Link is Up 10 Gbps\n":                           false,
		"6,505,2,-;ixgbevf 0000:00:05.0: Intel(R) 82599 Virtual Function\n":                  false,
		"6,506,2,-;clocksource: Switched to clocksource tsc\n":                               false,
		"no record, though it says that the NIC Link is Down, as records have a semicolon\n": false,
	}
	for record, want := range tests {
		if message, got := resetSign(record); got != want {
			t.Errorf("resetSign(%q) = %q, %v, want %v", record, message, got, want)
		}
	}
}

func TestKernelLogKeepsTheLastSigns(t *testing.T) {
	var w kernelLog
	for range 100 {
		w.note("old")
	}
	w.note("new")
	got := w.signs()
	if got.Count != 101 || len(got.Lines) != 64 || got.Lines[63] != "new" {
		t.Errorf("after 101 signs: count %d, %d lines, the last is %q", got.Count, len(got.Lines), got.Lines[len(got.Lines)-1])
	}
}

func TestInterrupts(t *testing.T) {
	const table = `           CPU0       CPU1
  4:        100          0   IO-APIC    4-edge      ttyS0
 24:         10          5   PCI-MSIX-0000:00:05.0    0-edge      eth0-TxRx-0
 25:          1          0   PCI-MSIX-0000:00:05.0    1-edge      eth0
NMI:          0          0   Non-maskable interrupts
ERR:          0
`
	want := map[string]uint64{"eth0-TxRx-0": 15, "eth0": 1}
	if diff := cmp.Diff(want, interrupts(table, "eth0")); diff != "" {
		t.Errorf("interrupts (-want +got):\n%s", diff)
	}
	if got := interrupts(""); len(got) != 0 {
		t.Errorf("interrupts of an empty table: %v", got)
	}
}

func TestFind(t *testing.T) {
	devices := []netDevice{{name: "eth0"}, {name: "eth1"}}
	for name, want := range map[string]int{"": 0, "eth0": 0, "eth1": 1} {
		if got, err := find(devices, name); err != nil || got != want {
			t.Errorf("find(%q) = %d, %v, want %d", name, got, err, want)
		}
	}
	for _, devices := range [][]netDevice{nil, devices} {
		if _, err := find(devices, "lo"); err == nil {
			t.Errorf("find(lo) among %v: no error", devices)
		}
	}
	if _, err := find(nil, ""); err == nil {
		t.Error("find of the first of no devices: no error")
	}
}
