package vfiouser

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDescriptorsInBatch shows that descriptors reach the message they were
// sent with, however many messages the server finds waiting.
func TestDescriptorsInBatch(t *testing.T) {
	const page = 4096
	mapAt := func(addr uint64) []byte {
		b := putUint32s(make([]byte, dmaMapSize), dmaMapSize, dmaFlagRead|dmaFlagWrite)
		le.PutUint64(b[16:], addr)
		le.PutUint64(b[24:], page)
		return frame(cmdDMAMap, 0, b)
	}
	post := frame(cmdRegionWrite, flagNoReply, append(regionAccess(RegionBAR0, 8, 4), 1, 2, 3, 4))
	type send struct {
		data []byte
		fds  int
	}
	for _, tt := range []struct {
		name   string
		sends  []send
		mapped []uint64 // the ranges that came with a descriptor
		ranges int
		writes int
	}{
		{"in the middle", []send{{post, 0}, {post, 0}, {mapAt(0), 1}, {post, 0}}, []uint64{0}, 1, 3},
		{"second of two", []send{{mapAt(0), 0}, {mapAt(page), 1}}, []uint64{page}, 2, 0},
		{"first of two", []send{{mapAt(0), 1}, {mapAt(page), 0}}, []uint64{0}, 2, 0},
		{"each", []send{{mapAt(0), 1}, {mapAt(page), 1}, {mapAt(2 * page), 1}}, []uint64{0, page, 2 * page}, 3, 0},
		{"first of one call", []send{{append(mapAt(0), post...), 1}}, []uint64{0}, 1, 1},
		{"last of one call", []send{{slices.Concat(post, mapAt(0)), 1}}, []uint64{0}, 1, 1},
		{"header apart", []send{{post, 0}, {mapAt(0)[:headerSize], 1}, {mapAt(0)[headerSize:], 0}}, []uint64{0}, 1, 1},
		{"body apart", []send{{mapAt(0)[:headerSize], 0}, {mapAt(0)[headerSize:], 1}, {post, 0}}, []uint64{0}, 1, 1},
		{"header in parts", []send{{post, 0}, {mapAt(0)[:3], 1}, {mapAt(0)[3:], 0}}, []uint64{0}, 1, 1},
		{"second, header in parts", []send{{mapAt(0), 0}, {mapAt(page)[:3], 1}, {mapAt(page)[3:], 0}}, []uint64{page}, 2, 0},
		{"unwanted", []send{{post, 1}, {mapAt(0), 1}}, []uint64{0}, 1, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev, _, c := connect(t, nil)
			file := memfd(t, page)
			entered, release := make(chan struct{}, 1), make(chan struct{})
			dev.setOnWrite(func(op RegionWriteOp) error {
				if op.Offset == 0 {
					entered <- struct{}{}
					<-release
				}
				return nil
			})
			before := openFDs(t)
			// What follows waits in the socket while the device is busy.
			if err := c.PostRegionWrite(RegionBAR0, 0, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			wait(t, entered)
			for _, s := range tt.sends {
				var oob []byte
				if s.fds > 0 {
					oob = unix.UnixRights(int(file.Fd()))
				}
				if err := c.link.sock.send(s.data, oob, testTimeout); err != nil {
					t.Fatal(err)
				}
			}
			close(release)
			if err := c.RegionRead(testContext(t), RegionBAR0, 0, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			var mapped []uint64
			ranges := dev.mem.Ranges()
			for _, r := range ranges {
				if r.Mapped {
					mapped = append(mapped, r.Addr)
				}
			}
			if !slices.Equal(mapped, tt.mapped) || len(ranges) != tt.ranges {
				t.Errorf("mapped %#x of %d ranges, want %#x of %d", mapped, len(ranges), tt.mapped, tt.ranges)
			}
			if n := len(dev.written()) - 1; n != tt.writes {
				t.Errorf("%d writes, want %d", n, tt.writes)
			}
			if after := openFDs(t); after != before {
				t.Errorf("%d descriptors are open, %d were", after, before)
			}
		})
	}
}

// TestManyPostedWrites shows that none is lost, and their order kept, where
// messages lie across the end of what is read at once.
func TestManyPostedWrites(t *testing.T) {
	dev, _, c := connect(t, nil)
	const n = 10_000
	for i := range uint32(n) {
		if err := c.PostRegionWrite(RegionBAR0, 8, le.AppendUint32(nil, i)); err != nil {
			t.Fatal(err)
		}
		if i%1000 == 0 { // one that is larger than all before
			big := make([]byte, 4000)
			le.PutUint32(big, i)
			if err := c.PostRegionWrite(RegionBAR0, 8, big); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.RegionRead(testContext(t), RegionBAR0, 0, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	next := uint32(0)
	for _, w := range dev.written() {
		if len(w.Data) == 4000 {
			next--
		}
		if got := le.Uint32(w.Data); got != next {
			t.Fatalf("write %d came where %d was due", got, next)
		}
		next++
	}
	if next != n {
		t.Errorf("%d writes came, %d were posted", next, n)
	}
}

// TestMessageBeyondBuffer shows that a message larger than what is read ahead is
// taken, and what follows it.
func TestMessageBeyondBuffer(t *testing.T) {
	dev, _, c := connect(t, nil)
	body := append(regionAccess(RegionBAR0, 0, inboxSize), make([]byte, 3*inboxSize)...)
	if _, err := c.link.request(testContext(t), cmdRegionWrite, body); err == nil {
		t.Error("a write beyond the region was accepted")
	}
	if err := c.RegionWrite(testContext(t), RegionBAR0, 8, []byte{1, 2, 3, 4}); err != nil {
		t.Fatal(err)
	}
	if n := len(dev.written()); n != 1 {
		t.Errorf("%d writes, want 1", n)
	}
}
