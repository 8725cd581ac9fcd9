//go:build e2esriov

package tests

import (
	"encoding/binary"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/vfiouser"
	"compsc.io/compsc/e2e/sriov/driver"
)

// mapped is a mediated VF the pages of which that its device process offers are
// mapped, as QEMU would map them into a guest. It is a driver.Bus.
type mapped struct {
	*mediated
	region *vfiouser.RegionMap
	pages  map[uint32][]byte
	// past and through count the accesses by either way.
	past, through int
}

func mapPages(m *mediated) *mapped {
	m.Helper()
	region, err := m.client.RegionMap(m.Context(), vfiouser.RegionBAR0)
	m.must(err)
	if region == nil {
		m.Fatal("nothing of BAR0 can be mapped")
	}
	b := &mapped{mediated: m, region: region, pages: map[uint32][]byte{}}
	m.Cleanup(b.unmap)
	for _, a := range region.Areas {
		mem, err := region.Map(a)
		m.must(err)
		b.pages[uint32(a.Offset)] = mem
	}
	return b
}

// unmap does what the end of QEMU does. It may be called again.
func (b *mapped) unmap() {
	for off, mem := range b.pages {
		b.must(unix.Munmap(mem))
		delete(b.pages, off)
	}
	b.region.File.Close()
}

// register is a register on a mapped page, nil for another.
func (b *mapped) register(off uint32) *uint32 {
	if mem := b.pages[off&^0xfff]; mem != nil {
		b.past++
		return (*uint32)(unsafe.Pointer(&mem[off&0xfff]))
	}
	b.through++
	return nil
}

func (b *mapped) Read(off uint32) uint32 {
	if r := b.register(off); r != nil {
		return atomic.LoadUint32(r)
	}
	return b.mediated.Read(off)
}

// Write waits for the answer to what does not go past the device process, as
// QEMU does for such a device.
func (b *mapped) Write(off, v uint32) {
	if r := b.register(off); r != nil {
		atomic.StoreUint32(r, v)
		return
	}
	b.mediated.Write(off, v)
	b.mediated.Read(igbvf.STATUS)
}

// TestFastPath: a guest sets its rings up and rings its doorbells in pages of a
// real VF that it has mapped, while interrupts, mailbox and counters go through
// the device process.
func TestFastPath(t *testing.T) {
	h, err := host.NewSRIOV(host.SRIOVOptions{Journal: filepath.Join(t.TempDir(), "journal"), Families: map[string]string{"8086:10ca": "igbvf"}})
	if err != nil {
		t.Fatal(err)
	}
	vf := vfs[0][0]
	peer := newPeer(t)
	if err := peer.Start(peerMAC); err != nil {
		t.Fatal(err)
	}
	before := state(t, vf)
	file, mem := sharedRAM(t)
	m := mediateAs(t, h, vf, file, true)
	bus := mapPages(m)
	if want := []vfiouser.Area{{Offset: 0x2000, Size: 0x1000}, {Offset: 0x3000, Size: 0x1000}}; !slices.Equal(bus.region.Areas, want) {
		t.Fatalf("mapped can be %v, want %v", bus.region.Areas, want)
	}

	guest := driver.New(bus, mem, base)
	m.must(guest.Start(guestMAC))
	counters := func() (rx, tx uint32) { return bus.Read(igbvf.VFGPRC), bus.Read(igbvf.VFGPTC) }
	rx, tx := counters()
	bus.past, bus.through = 0, 0
	const frames = 2*driver.RingSize + 3 // around the rings
	m.must(exchange(guest, peer, frames, "from the guest"))
	m.must(exchange(peer, guest, frames, "to the guest"))
	if bus.through != 0 || bus.past < 2*frames {
		t.Errorf("frames took %d accesses to the mapped pages and %d others", bus.past, bus.through)
	}
	for _, vector := range []int{driver.VectorRX, driver.VectorTX} {
		m.must(await(int(m.events[vector].Fd()), slow))
	}
	if nowRX, nowTX := counters(); nowRX-rx != frames || nowTX-tx != frames {
		t.Errorf("counted were %d frames received and %d sent, want %d each", nowRX-rx, nowTX-tx, frames)
	}
	// Both ways lead to the same registers.
	if past, through := bus.Read(igbvf.TDT(0)), m.Read(igbvf.TDT(0)); past != through || past == 0 {
		t.Errorf("the doorbell reads %d past the device process and %d through it", past, through)
	}
	withPF(t, guest, cards[0])
	measureDoorbells(bus)

	// This kernel's IOMMU has no dirty bits: the VF says that it cannot be moved.
	if why := immovable(m); !strings.Contains(why, "the IOMMU of its node does not record what memory it writes") {
		t.Errorf("the device process says of moving the VF: %q", why)
	}

	// QEMU has the VF open too: it goes on without its device process, and is
	// silent once QEMU has ended.
	m.kill()
	m.must(exchange(peer, guest, 1, "without a device process"))
	bus.unmap()
	snapshot := append(ram{}, mem...)
	peer.Send(guestMAC, "into the void")
	m.must(peer.Sent())
	if string(snapshot) != string(mem) {
		t.Error("the VF wrote into the guest's memory after everybody had closed it")
	}
	m.must(h.Release(t.Context(), vf.Address))
	if is := state(t, vf); is != before {
		t.Errorf("the VF was %s, and is %s after its release", before, is)
	}
}

// immovable asks the device process why its VF cannot be moved.
func immovable(m *mediated) string {
	m.Helper()
	conn, err := grpc.NewClient("unix:"+m.control, grpc.WithTransportCredentials(insecure.NewCredentials()))
	m.must(err)
	defer conn.Close()
	st, err := pb.NewDeviceClient(conn).Status(m.Context(), &pb.StatusRequest{})
	m.must(err)
	if len(st.Interfaces) != 1 || !st.Interfaces[0].FastPath {
		m.Errorf("the device process says %v, want one interface with the fast path", st)
	}
	return st.GetInterfaces()[0].Immovable
}

// measureDoorbells tells what ringing a doorbell takes the guest, by each way.
func measureDoorbells(b *mapped) {
	tail := b.Read(igbvf.TDT(0)) // where it is: there is nothing to send
	raw := binary.LittleEndian.AppendUint32(nil, tail)
	const rounds = 300
	median := func(ring func()) time.Duration {
		var took []time.Duration
		for range rounds {
			begin := time.Now()
			ring()
			took = append(took, time.Since(begin))
		}
		slices.Sort(took)
		return took[rounds/2]
	}
	past := median(func() { b.Write(igbvf.TDT(0), tail) })
	posted := median(func() { b.must(b.client.PostRegionWrite(vfiouser.RegionBAR0, uint64(igbvf.TDT(0)), raw)) })
	answered := median(func() { b.must(b.client.RegionWrite(b.Context(), vfiouser.RegionBAR0, uint64(igbvf.TDT(0)), raw)) })
	b.Logf("a doorbell takes the guest, median of %d: %v mapped, %v by a posted message, %v by one that is answered", rounds, past, posted, answered)
}
