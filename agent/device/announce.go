package device

import "encoding/binary"

// announcement is the frame that tells the network's switches where a MAC now
// is: a RARP request for oneself (RFC 903), broadcast, as QEMU sends for a
// paravirtual NIC (net/announce.c). No host answers it, and no guest needs to
// have an IP address for it.
func announcement(mac []byte) []byte {
	be := binary.BigEndian
	f := make([]byte, 0, 60)
	f = append(f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	f = append(f, mac...)
	f = be.AppendUint16(f, 0x8035) // RARP
	f = be.AppendUint16(f, 1)      // Ethernet
	f = be.AppendUint16(f, 0x0800) // IPv4
	f = append(f, 6, 4)
	f = be.AppendUint16(f, 3) // request reverse
	f = append(f, mac...)
	f = append(f, 0, 0, 0, 0)
	f = append(f, mac...)
	f = append(f, 0, 0, 0, 0)
	return f[:60]
}
