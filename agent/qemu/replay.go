package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
)

// Offsets in the configuration space of a VF, PCI Local Bus Specification 3.0
// section 6.1; the capabilities are where package pci puts them.
const (
	cfgCommand   = 0x04
	cfgBAR0      = 0x10
	cfgBAR3      = 0x1c
	cfgBAR4      = 0x20
	cfgIntLine   = 0x3c
	cfgMSIXCtl   = 0x72
	cfgDevCtl    = 0xa8
	cfgSize      = 0x100
	commandMem   = 0x2
	commandBM    = 0x4
	ecamQ35      = 0xb0000000 // MMCONFIG base that SeaBIOS and OVMF program on q35
	cfgPortAddr  = 0xcf8
	cfgPortData  = 0xcfc
	cfgPortValid = 1 << 31
)

// DMA is the access that a vfio-user server has to QEMU's address space. It
// reaches the guest's RAM, the device's own MSI-X table and ECAM, once bus
// mastering is enabled.
type DMA interface {
	DMARead(ctx context.Context, addr uint64, p []byte) error
	DMAWrite(ctx context.Context, addr uint64, p []byte) error
}

// Function is the PCI function of a VF on bus 0 of the guest: device slot.
type Function struct {
	// Slot is the device number, 1 to 31; the function number is 0.
	Slot int
}

// PCIState is what QEMU holds of a VF and stock vfio-user-pci does not migrate.
type PCIState struct {
	// Config is the first 256 bytes of configuration space as the guest sees it.
	Config []byte
	// MSIX is the MSI-X table, 16 bytes a vector, little-endian.
	MSIX []byte
}

// Valid tells whether s has the expected sizes.
func (s PCIState) Valid(vectors int) error {
	if len(s.Config) != cfgSize {
		return fmt.Errorf("configuration space of %d bytes, want %d", len(s.Config), cfgSize)
	}
	if len(s.MSIX) != 16*vectors {
		return fmt.Errorf("MSI-X table of %d bytes, want %d for %d vectors", len(s.MSIX), 16*vectors, vectors)
	}
	return nil
}

// Equal tells whether two states are the same.
func (s PCIState) Equal(o PCIState) bool {
	return bytes.Equal(s.Config, o.Config) && bytes.Equal(s.MSIX, o.MSIX)
}

func (s PCIState) u16(off int) uint16 { return binary.LittleEndian.Uint16(s.Config[off:]) }
func (s PCIState) u32(off int) uint32 { return binary.LittleEndian.Uint32(s.Config[off:]) }

// TableAddress is the guest-physical address of the MSI-X table: the start
// of BAR3, a 64-bit BAR.
func TableAddress(config []byte) uint64 {
	lo := binary.LittleEndian.Uint32(config[cfgBAR3:])
	hi := binary.LittleEndian.Uint32(config[cfgBAR4:])
	return uint64(lo&^0xf) | uint64(hi)<<32
}

// BusMaster tells whether the guest lets the device use DMA, without which no
// server-initiated access works either.
func BusMaster(config []byte) bool {
	const both = commandMem | commandBM
	return binary.LittleEndian.Uint16(config[cfgCommand:])&both == both
}

// ReadTable reads the MSI-X table of a running guest, which the server never
// sees being written. All zero when the guest has not enabled the device.
func ReadTable(ctx context.Context, dma DMA, config []byte, vectors int) ([]byte, error) {
	table := make([]byte, 16*vectors)
	if !BusMaster(config) {
		return table, nil
	}
	if err := dma.DMARead(ctx, TableAddress(config), table); err != nil {
		return nil, fmt.Errorf("reading the MSI-X table: %w", err)
	}
	return table, nil
}

// Arm replays s into a QEMU that waits for an incoming migration; the result
// persists through the load of the stream. Configuration writes go through
// the monitor, because the server cannot reach QEMU before bus mastering is
// on and the guest's ECAM does not exist yet. Memory decoding and bus
// mastering are switched on whatever s says, so that Finish can correct the
// rest in band.
func Arm(ctx context.Context, m *Monitor, f Function, dma DMA, s PCIState) error {
	type write struct {
		off, size int
		val       uint32
	}
	for _, w := range []write{
		{cfgBAR0, 4, s.u32(cfgBAR0)},
		{cfgBAR0 + 4, 4, s.u32(cfgBAR0 + 4)},
		{cfgBAR3, 4, s.u32(cfgBAR3)},
		{cfgBAR4, 4, s.u32(cfgBAR4)},
		{cfgIntLine, 1, uint32(s.Config[cfgIntLine])},
		{cfgDevCtl, 2, uint32(s.u16(cfgDevCtl))},
		{cfgCommand, 2, uint32(s.u16(cfgCommand) | commandMem | commandBM)},
	} {
		if err := m.configWrite(ctx, f, w.off, w.size, w.val); err != nil {
			return err
		}
	}
	if err := writeTable(ctx, dma, s); err != nil {
		return err
	}
	return m.configWrite(ctx, f, cfgMSIXCtl, 2, uint32(s.u16(cfgMSIXCtl)))
}

// Finish brings QEMU, armed with armed and now held before its start with the
// guest's memory loaded, to final. It uses DMA alone, since no monitor
// answers while the main loop is held, and writes only what differs. The
// command register comes last, because it may switch DMA off.
func Finish(ctx context.Context, f Function, dma DMA, armed, final PCIState) error {
	ecam := uint64(ecamQ35) + uint64(f.Slot)<<15
	put := func(off, size int) error {
		if bytes.Equal(armed.Config[off:off+size], final.Config[off:off+size]) {
			return nil
		}
		if err := dma.DMAWrite(ctx, ecam+uint64(off), final.Config[off:off+size]); err != nil {
			return fmt.Errorf("replaying configuration register %#x: %w", off, err)
		}
		return nil
	}
	for _, off := range []int{cfgBAR0, cfgBAR0 + 4, cfgBAR3, cfgBAR4} {
		if err := put(off, 4); err != nil {
			return err
		}
	}
	if err := put(cfgIntLine, 1); err != nil {
		return err
	}
	if err := put(cfgDevCtl, 2); err != nil {
		return err
	}
	if !bytes.Equal(armed.MSIX, final.MSIX) {
		if err := writeTable(ctx, dma, final); err != nil {
			return err
		}
	}
	if err := put(cfgMSIXCtl, 2); err != nil {
		return err
	}
	command := final.u16(cfgCommand)
	if command&(commandMem|commandBM) == commandMem|commandBM &&
		command == armed.u16(cfgCommand)|commandMem|commandBM {
		return nil
	}
	return dma.DMAWrite(ctx, ecam+cfgCommand, binary.LittleEndian.AppendUint16(nil, command))
}

func writeTable(ctx context.Context, dma DMA, s PCIState) error {
	if err := dma.DMAWrite(ctx, TableAddress(s.Config), s.MSIX); err != nil {
		return fmt.Errorf("replaying the MSI-X table: %w", err)
	}
	return nil
}

// configWrite writes to configuration space through the I/O ports of PCI
// configuration mechanism #1. What it leaves in the address port is
// overwritten when the migration stream is loaded.
func (m *Monitor) configWrite(ctx context.Context, f Function, off, size int, val uint32) error {
	addr := uint32(cfgPortValid) | uint32(f.Slot)<<11 | uint32(off)&0xfc
	if _, err := m.hmp(ctx, fmt.Sprintf("o /w %#x %#x", cfgPortAddr, addr)); err != nil {
		return err
	}
	unit := map[int]string{1: "b", 2: "h", 4: "w"}[size]
	out, err := m.hmp(ctx, fmt.Sprintf("o /%s %#x %#x", unit, cfgPortData+off&3, val))
	if err != nil {
		return err
	}
	if out != "" {
		return fmt.Errorf("replaying configuration register %#x: QEMU answered %q", off, out)
	}
	return nil
}
