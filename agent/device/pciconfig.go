package device

import "encoding/binary"

// Layout of the VF's configuration space. The capabilities stand where the
// 82599 and the 82576 VF have them. The PCIe capability claims FLR although
// the real 82599 VF reads zeros there (Specification Update erratum 35,
// worked around by a quirk of Linux): the guest sees what a sound VF shows.
const (
	configSize = 4096

	cfgVendor     = 0x00
	cfgDevice     = 0x02
	cfgCommand    = 0x04
	cfgStatus     = 0x06
	cfgRevision   = 0x08
	cfgBAR0       = 0x10
	cfgBAR3       = 0x1c
	cfgSubVendor  = 0x2c
	cfgSubDevice  = 0x2e
	cfgCapPtr     = 0x34
	cfgIntLine    = 0x3c
	cfgMSIX       = 0x70
	cfgPCIe       = 0xa0
	cfgDevCtl     = cfgPCIe + 8
	cfgLinkCtl    = cfgPCIe + 16
	msixPBAOffset = 0x2000
)

// pciConfig is the configuration space that the guest sees. Not safe for
// concurrent use.
type pciConfig struct {
	b    [configSize]byte
	mask [configSize]byte // bits the guest can write
}

func newPCIConfig(vendor, device uint16, vectors int) *pciConfig {
	c := &pciConfig{}
	le := binary.LittleEndian
	le.PutUint16(c.b[cfgVendor:], vendor)
	le.PutUint16(c.b[cfgDevice:], device)
	le.PutUint16(c.b[cfgStatus:], 0x0010)       // capability list
	le.PutUint32(c.b[cfgRevision:], 0x02000001) // Ethernet controller, revision 1
	for _, bar := range []int{cfgBAR0, cfgBAR3} {
		le.PutUint32(c.b[bar:], 0xc) // 64-bit, prefetchable
		le.PutUint32(c.mask[bar:], 0xfffffff0)
		le.PutUint32(c.mask[bar+4:], 0xffffffff)
	}
	le.PutUint16(c.b[cfgSubVendor:], vendor)
	c.b[cfgCapPtr] = cfgMSIX

	c.b[cfgMSIX] = 0x11 // MSI-X
	c.b[cfgMSIX+1] = cfgPCIe
	le.PutUint16(c.b[cfgMSIX+2:], uint16(vectors-1))
	le.PutUint32(c.b[cfgMSIX+4:], 3)               // table: BAR3, offset 0
	le.PutUint32(c.b[cfgMSIX+8:], msixPBAOffset|3) // pending bits: BAR3
	le.PutUint16(c.mask[cfgMSIX+2:], 0xc000)

	c.b[cfgPCIe] = 0x10 // PCI Express
	le.PutUint16(c.b[cfgPCIe+2:], 0x0002)
	le.PutUint32(c.b[cfgPCIe+4:], 0x10008cc2)
	le.PutUint32(c.b[cfgPCIe+12:], 0x00000482)
	le.PutUint16(c.b[cfgPCIe+18:], 0x0082)

	le.PutUint16(c.mask[cfgCommand:], 0x0547)
	c.mask[cfgIntLine] = 0xff
	le.PutUint16(c.mask[cfgDevCtl:], 0x7fff)
	c.mask[cfgLinkCtl] = 0xff
	return c
}

// write applies the writable bits of p at off; what lies outside is dropped.
func (c *pciConfig) write(off uint64, p []byte) {
	for i, v := range p {
		if o := off + uint64(i); o < configSize {
			c.b[o] = c.b[o]&^c.mask[o] | v&c.mask[o]
		}
	}
}

// read fills p from off; outside it reads zeros.
func (c *pciConfig) read(off uint64, p []byte) {
	for i := range p {
		p[i] = 0
		if o := off + uint64(i); o < configSize {
			p[i] = c.b[o]
		}
	}
}

// legacy returns a copy of the first 256 bytes.
func (c *pciConfig) legacy() []byte { return append([]byte(nil), c.b[:256]...) }
