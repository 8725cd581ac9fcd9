package ipxe

import (
	"fmt"
	"net/netip"
	"strings"
)

// script is what iPXE runs: a static address, the parts one after the other,
// each followed by a question that the server answers once the part was seen
// in the VM's RAM, then Linux in the same way. Whatever fails is reported, if
// it still can be, and ends the VM.
func script(guest netip.Prefix, base string, parts int, kernelArgs string) (string, error) {
	if !guest.Addr().Is4() || parts < 1 || strings.ContainsAny(kernelArgs, "\n$") {
		return "", fmt.Errorf("no script for %s, %d parts, arguments %q", guest, parts, kernelArgs)
	}
	mask := netip.PrefixFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), guest.Bits()).Masked().Addr()
	lines := []string{
		"#!ipxe",
		"set net0/ip " + guest.Addr().String(),
		"set net0/netmask " + mask.String(),
		"ifopen net0 || goto failed",
		// Colons would need quoting.
		"imgfetch --name answer " + base + openPath + "?chip=${net0/chip}&mac=${net0/mac:hexhyp} || goto failed",
		"imgfree answer",
		"set i:int32 0",
		":part",
		"imgfetch --name part " + base + partPath + "${i} || goto failed",
		"imgfetch --name answer " + base + checkPath + "${i} || goto failed",
		"imgfree answer",
		"imgfree part",
		"inc i",
		fmt.Sprintf("iseq ${i} %d || goto part", parts),
		"kernel --name kernel " + base + kernelPath + " " + kernelArgs + " || goto failed",
		"initrd --name initrd " + base + initrdPath + " || goto failed",
		"imgfetch --name answer " + base + checkPath + checkLinux + " || goto failed",
		"imgfree answer",
		"imgstat",
		"boot kernel || goto failed",
		":failed",
		"imgfetch " + base + failedPath + "?i=${i}&errno=${errno} ||",
		"ifstat",
		"poweroff",
	}
	return strings.Join(lines, "\n") + "\n", nil
}
