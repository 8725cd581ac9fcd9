package compsc

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

func TestGuestAccessIsConfined(t *testing.T) {
	for _, tc := range []struct {
		name      string
		off       uint32
		write     uint32
		hardware  uint32 // beforehand
		wantInHW  uint32
		wantGuest uint32
	}{
		{"unknown register", 0x0ff0, 5, 9, 9, 0},
		{"queue the VF does not have", ixgbevf.VFRDBAL(2), 0x80, 9, 9, 0},
		{"unaligned", ixgbevf.VFRDBAL(0) + 1, 5, 9, 9, 0},
		{"behind the last register", ixgbevf.BARSize, 5, 9, 9, 0},
		{"far behind it", 0xfffffffc, 5, 9, 9, 0},
		{"read-only", ixgbevf.VFLINKS, 5, 0x70000080, 0x70000080, 0x70000080},
		{"counter", ixgbevf.VFGPRC, 5, 42, 42, 42},
		{"bits that do not exist", ixgbevf.VFRDLEN(0), 0xffffffff, 0, 0x000fff80, 0x000fff80},
		{"bits of the host", ixgbevf.VFDCARXCTRL(0), 0xff00b2e0, 0, 0x0000a200, 0x0000a200},
		{"bits that hardware shows but guests do not have", ixgbevf.VFPSRTYPE, 0x30, 0, 0x30, 0x30},
		{"write-only", ixgbevf.VFCTRL, 0, 0x55, 0, 0},
		{"mask, set bits", ixgbevf.VTEIMS, 0xff, 0, 7, 7},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newFake()
			v, _ := newVF(d)
			d.regs[tc.off] = tc.hardware
			v.GuestWrite(tc.off, tc.write)
			if tc.off != ixgbevf.VFCTRL && d.regs[tc.off] != tc.wantInHW {
				t.Errorf("hardware has %#x, want %#x", d.regs[tc.off], tc.wantInHW)
			}
			if got := v.GuestRead(tc.off); got != tc.wantGuest {
				t.Errorf("guest reads %#x, want %#x", got, tc.wantGuest)
			}
		})
	}
}

func TestGuestReadsNoOtherBits(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	d.regs[ixgbevf.VFPSRTYPE] = 0xfffffff0
	if got := v.GuestRead(ixgbevf.VFPSRTYPE); got != 0xe0001330 {
		t.Errorf("VFPSRTYPE reads %#x, want 0xe0001330", got)
	}
}

func TestGuestSeesThatDeviceIsGone(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	d.gone = true
	for _, off := range []uint32{ixgbevf.VFSTATUS, ixgbevf.VFMAILBOX, ixgbevf.VTEIMS} {
		if got := v.GuestRead(off); got != allOnes {
			t.Errorf("register %#x reads %#x, want all ones", off, got)
		}
	}
	if err := v.Quiesce(context.Background()); !errors.Is(err, ErrGone) {
		t.Errorf("quiesce: %v, want %v", err, ErrGone)
	}
}

// readCounter reads a counter as the Linux driver does.
func readCounter(v *VF, c family.Counter) uint64 {
	low := v.GuestRead(c.Low)
	if c.High == 0 {
		return uint64(low)
	}
	return uint64(v.GuestRead(c.High))<<32 | uint64(low)
}

// Over several hops and across the wraps of both widths, a driver that adds
// up differences as Linux does counts what really went over the wire.
func TestCountersContinueAcrossHops(t *testing.T) {
	ctx := context.Background()
	device := newFake()
	device.regs[ixgbevf.VFGPRC] = 0xfffffff0
	device.regs[ixgbevf.VFGORCLSB], device.regs[ixgbevf.VFGORCMSB] = 0xffffff00, 0xf
	device.regs[ixgbevf.VFGOTCLSB], device.regs[ixgbevf.VFGOTCMSB] = 0xfffffff0, 3
	v, _ := newVF(device)
	boot(t, v, device)
	counters := v.f.Counters()
	last, total := make([]uint64, len(counters)), make([]uint64, len(counters))
	for i, c := range counters {
		last[i] = readCounter(v, c)
	}
	update := func() {
		for i, c := range counters {
			now := readCounter(v, c)
			if now < last[i] {
				total[i] += 1 << c.Width
			}
			total[i], last[i] = total[i]+now-last[i], now
		}
	}
	const hops, received, sent = 3, 30, 5
	for hop := range hops {
		if got := device.receive(received); got != received {
			t.Fatalf("hop %d: received %d of %d frames", hop, got, received)
		}
		for n := range 2 {
			tail := (v.GuestRead(ixgbevf.VFTDT(n)) + sent) % ringSize
			v.GuestWrite(ixgbevf.VFTDT(n), tail)
		}
		update()
		s := capture(t, v)
		device = usedTarget()
		device.regs[ixgbevf.VFGPRC] = uint32(0x80000000 * hop)
		device.regs[ixgbevf.VFGOTCMSB] = uint32(5 * hop)
		v, _ = newVF(device)
		if _, err := v.Restore(ctx, s); err != nil {
			t.Fatal(err)
		}
		update()
	}
	want := []uint64{hops * received, hops * received * 64, hops * received, hops * 2 * sent, hops * 2 * sent * 60}
	if diff := cmp.Diff(want, total); diff != "" {
		t.Errorf("totals of VFGPRC, VFGORC, VFMPRC, VFGPTC, VFGOTC (-want +got):\n%s", diff)
	}
}

func TestCounterHalvesBelongTogether(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	d.regs[ixgbevf.VFGORCLSB], d.regs[ixgbevf.VFGORCMSB] = 0xffffffff, 1
	low := v.GuestRead(ixgbevf.VFGORCLSB)
	d.regs[ixgbevf.VFGORCLSB], d.regs[ixgbevf.VFGORCMSB] = 0, 2
	if high := v.GuestRead(ixgbevf.VFGORCMSB); low != 0xffffffff || high != 1 {
		t.Errorf("read %#x and %#x, want 0xffffffff and 1", low, high)
	}
	if high := v.GuestRead(ixgbevf.VFGORCMSB); high != 2 {
		t.Errorf("the high half alone reads %d, want 2", high)
	}
}

// The lower half was read on one VF, and the upper one belongs to it on the
// next, and after a veto, whatever has been counted meanwhile.
func TestLatchedHalfMoves(t *testing.T) {
	for _, veto := range []bool{false, true} {
		source, target := newFake(), usedTarget()
		v, w := newMemoryVF(source), newMemoryVF(target)
		boot(t, v, source)
		source.regs[ixgbevf.VFGORCLSB], source.regs[ixgbevf.VFGORCMSB] = 0xffffffff, 3
		low := v.GuestRead(ixgbevf.VFGORCLSB)
		source.regs[ixgbevf.VFGORCLSB], source.regs[ixgbevf.VFGORCMSB] = 5, 4
		s := capture(t, v)
		if b, err := s.Encode(); err != nil {
			t.Fatal(err)
		} else if s, err = Decode(b); err != nil {
			t.Fatal(err)
		}
		if veto {
			if err := v.Unquiesce(context.Background()); err != nil {
				t.Fatal(err)
			}
			w = v
		} else if _, err := w.Restore(context.Background(), s); err != nil {
			t.Fatal(err)
		}
		if high := w.GuestRead(ixgbevf.VFGORCMSB); low != 0xffffffff || high != 3 {
			t.Errorf("veto %v: read %#x and %#x, want 0xffffffff and 3", veto, low, high)
		}
		if high := w.GuestRead(ixgbevf.VFGORCMSB); high != 4 {
			t.Errorf("veto %v: the high half alone reads %d, want 4", veto, high)
		}
	}
}

// tearing is a device whose counter wraps into the high half between the
// first read of the low half and that of the high one.
type tearing struct {
	*fakeVF
	reads int
}

func (d *tearing) Read(off uint32) uint32 {
	if d.reads++; d.reads == 2 {
		d.regs[ixgbevf.VFGORCLSB], d.regs[ixgbevf.VFGORCMSB] = 4, 1
	}
	return d.fakeVF.Read(off)
}

func TestCounterSampleIsNotTorn(t *testing.T) {
	d := &tearing{fakeVF: newFake()}
	d.regs[ixgbevf.VFGORCLSB] = 0xfffffffe
	v := New(ixgbevf.New(0), d, Options{})
	got := readCounter(v, v.f.Counters()[1])
	if got != 1<<32+4 {
		t.Errorf("read %#x, want %#x", got, uint64(1<<32+4))
	}
}

func TestGuestReset(t *testing.T) {
	for _, clears := range []bool{false, true} {
		d := newFake()
		d.resetsCounters = clears
		v, _ := newVF(d)
		boot(t, v, d)
		before := readCounter(v, v.f.Counters()[0])
		if v.Summary().MAC == nil || v.GuestResets() != 1 {
			t.Fatalf("after the start: MAC %x, %d resets, want one of each", v.Summary().MAC, v.GuestResets())
		}
		v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
		if v.Summary().MAC != nil || v.GuestResets() != 2 {
			t.Errorf("after a reset: MAC %x, %d resets, want none and 2", v.Summary().MAC, v.GuestResets())
		}
		if got := readCounter(v, v.f.Counters()[0]); got != before {
			t.Errorf("counter %d after a reset, want %d (device clears them: %v)", got, before, clears)
		}
	}
}

func TestFunctionReset(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	called := false
	v.FunctionReset(func() { called = true })
	if !called || v.Summary().MAC != nil || v.GuestResets() != 1 {
		t.Errorf("called %v, MAC %x, %d resets, want true, none and 1", called, v.Summary().MAC, v.GuestResets())
	}
}

// A message of the PF that comes unasked is not taken for a reply, and a
// stale one not either.
func TestMailboxRecordsRepliesOnly(t *testing.T) {
	d := newFake()
	d.replyAfter = 1
	v, _ := newVF(d)
	v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	d.ping()
	v.GuestWrite(ixgbevf.VFMBMEM, ixgbevf.MsgReset)
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if got := v.GuestRead(ixgbevf.VFMAILBOX); got&ixgbevf.MailboxPFSTS == 0 {
		t.Fatalf("the ping is not shown: %#x", got)
	}
	d.ping()
	v.GuestRead(ixgbevf.VFMAILBOX)
	if s := v.log.Marshal(); !cmp.Equal(s, v.f.NewLog().Marshal()) {
		t.Fatalf("something was recorded: %x", s)
	}
	d.tick()
	v.GuestRead(ixgbevf.VFMAILBOX)
	if s := v.log.Marshal(); cmp.Equal(s, v.f.NewLog().Marshal()) {
		t.Error("the reply was not recorded")
	}
}

func TestKickRaisesAssignedVectors(t *testing.T) {
	for _, tc := range []struct {
		name       string
		ivar, misc uint32
		links      uint32
		want       uint32
	}{
		{"none", 0, 0, ixgbevf.LinksUp, 0},
		{"one queue pair", 0x8080, 0x81, ixgbevf.LinksUp, 1},
		{"one vector for all", 0x8080, 0x80, ixgbevf.LinksUp, 1},
		{"two queue pairs", 0x81818080, 0x82, ixgbevf.LinksUp, 3},
		{"link down", 0x81818080, 0x82, 0, 7},
		{"not valid", 0x0101, 0x02, 0, 0},
		{"no such vector", 0x83, 0, ixgbevf.LinksUp, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newFake()
			v, _ := newVF(d)
			d.regs[ixgbevf.VTIVAR(0)], d.regs[ixgbevf.VTIVARMisc], d.regs[ixgbevf.VFLINKS] = tc.ivar, tc.misc, tc.links
			if told := v.Kick(); told != tc.want {
				t.Errorf("vectors %#x, want %#x", told, tc.want)
			}
			if got := d.regs[ixgbevf.VTEICR]; got != tc.want {
				t.Errorf("causes %#x, want %#x", got, tc.want)
			}
		})
	}
}

// The mailbox's vector is raised if the guest has not seen what the mailbox tells.
func TestKickForMail(t *testing.T) {
	for name, tc := range map[string]struct {
		mail func(*fakeVF, *VF)
		want uint32
	}{
		"nothing": {func(*fakeVF, *VF) {}, 3},
		"a ping":  {func(d *fakeVF, _ *VF) { d.ping() }, 7},
		"a ping that was dropped": {func(d *fakeVF, v *VF) {
			d.talkOver = func() overTalk { return overwrites }
			if _, err := v.exchange(t.Context(), []uint32{ixgbevf.MsgReset}); !errors.Is(err, errUnanswered) {
				t.Errorf("the ping was taken for the reply: %v", err)
			}
		}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFake()
			v, _ := newVF(d)
			boot(t, v, d)
			d.regs[ixgbevf.VFLINKS] = ixgbevf.LinksUp
			tc.mail(d, v)
			capture(t, v)
			if got := v.Kick(); got != tc.want {
				t.Errorf("vectors %#x, want %#x", got, tc.want)
			}
			if got := v.Kick() & 4; name == "a ping that was dropped" && got != 0 {
				t.Error("the vector is raised again")
			}
		})
	}
}

func TestHeadsInUse(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	if v.HeadsInUse() {
		t.Error("in use before the driver is loaded")
	}
	boot(t, v, d)
	if !v.HeadsInUse() {
		t.Error("not in use while the rings run")
	}
	capture(t, v)
	if !v.HeadsInUse() {
		t.Error("not in use once quiesced")
	}
}

func TestKickOfQuiesced(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	capture(t, v)
	v.Kick()
	if got := d.regs[ixgbevf.VTEICR]; got != 0 {
		t.Errorf("causes %#x while quiesced, want none", got)
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := d.regs[ixgbevf.VTEICR]; got != 7 {
		t.Errorf("causes %#x afterwards, want 7", got)
	}
}

// Bits that were kept for the guest die with a reset, as the device's do.
func TestGuestResetDropsKeptBits(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	d.ping()
	capture(t, v)
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	if got := v.GuestRead(ixgbevf.VFMAILBOX); got != ixgbevf.MailboxRSTD {
		t.Errorf("VFMAILBOX reads %#x, want RSTD alone", got)
	}
}

// The guest's accesses and the long operations of the engine may meet.
func TestConcurrentUse(t *testing.T) {
	d := newFake()
	v := New(ixgbevf.New(0), d, Options{Poll: time.Microsecond})
	boot(t, v, d)
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				v.GuestRead(ixgbevf.VFGORCLSB)
				v.GuestWrite(ixgbevf.VTEITR(0), 0x10)
				v.Summary()
				v.HeadsInUse()
			}
		})
	}
	for range 20 {
		s := capture(t, v)
		if err := v.Unquiesce(ctx); err != nil {
			t.Error(err)
		}
		if !slices.ContainsFunc(s.Queues, func(q QueueState) bool { return q.Enabled }) {
			t.Error("captured without an enabled queue")
		}
	}
	stop()
	wg.Wait()
}

func TestCheckSummary(t *testing.T) {
	f := ixgbevf.New(0)
	caps := Capabilities{WritableRXHeads: true, WritableTXHeads: true,
		Offer: family.Offer{APIs: []uint32{ixgbevf.API10, ixgbevf.API13}, MulticastFilterType: 1}}
	mac := []byte{2, 0, 0, 0, 0, 1}
	with := func(change func(*Capabilities)) Capabilities {
		c := caps
		change(&c)
		return c
	}
	for _, tc := range []struct {
		name  string
		sum   family.Summary
		heads bool
		caps  Capabilities
		want  string
	}{
		{"fits", family.Summary{API: ixgbevf.API13, MulticastFilterType: 1, MAC: mac}, true, caps, ""},
		{"API", family.Summary{API: ixgbevf.API14, MulticastFilterType: 1, MAC: mac}, true, caps, ReasonAPINotAccepted},
		{"filter type", family.Summary{API: ixgbevf.API13, MAC: mac}, true, caps, ReasonMulticastFilterMismatch},
		{"no driver", family.Summary{API: ixgbevf.API14}, false, caps, ""},
		{"never", family.Summary{NotMigratable: "IPsec"}, false, caps, ReasonNotMigratable},
		{"receive heads", family.Summary{}, true, with(func(c *Capabilities) { c.WritableRXHeads = false }), ReasonHeadNotRestorable},
		{"transmit heads", family.Summary{}, true, with(func(c *Capabilities) { c.WritableTXHeads = false }), ReasonHeadNotRestorable},
		{"heads not needed", family.Summary{}, false, Capabilities{}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) { wantReason(t, CheckSummary(f, tc.sum, tc.heads, tc.caps), tc.want) })
	}
}

func wantReason(t *testing.T, err error, want string) {
	t.Helper()
	var incompatible *IncompatibleError
	switch {
	case want == "" && err != nil:
		t.Errorf("error %v, want none", err)
	case want != "" && (!errors.As(err, &incompatible) || incompatible.Reason != want):
		t.Errorf("error %v, want reason %s", err, want)
	case want != "" && !strings.Contains(err.Error(), incompatible.Message):
		t.Errorf("error %q lacks its message", err)
	}
}
