package twin

import "compsc.io/compsc/agent/family/ixgbevf"

// pfEvent is something that the PF does by itself, and what the driver does
// about it. Of a VF in one hand alone the PF does nothing: what it does to one
// twin it does to the other.
func (g *guest) pfEvent() {
	if g.around == nil {
		return
	}
	f := g.fleet
	eachTwin := func(do func(*silicon)) func() {
		return func() {
			for _, t := range g.twins {
				do(t.vf)
			}
		}
	}
	what := g.rng.IntN(6)
	if what == 4 && g.refusedMAC {
		what = 0 // whether the PF still checks sources depends on why it refused: see docs/limits.md
	}
	switch what {
	case 0, 1:
		g.log.add("PF: ping")
		g.around(eachTwin(func(s *silicon) { s.Ping() }))
	case 2, 3:
		g.log.add("PF: link up %v", f.unplugged)
		g.around(func() {
			f.unplugged = !f.unplugged
			for _, s := range f.vfs {
				s.SetLink(!f.unplugged)
			}
		})
	case 4:
		g.log.add("PF: trust %v", !f.trusted)
		g.revoked = true
		g.around(func() {
			f.trusted, f.trustTaken = !f.trusted, f.trustTaken || f.trusted
			for _, s := range f.vfs {
				s.SetTrust(f.trusted)
			}
		})
	case 5:
		g.log.add("PF: reset")
		g.revoked = true
		g.around(eachTwin(func(s *silicon) { s.ResetPF() }))
	}
	g.heedPF()
}

// heedPF is the driver's handler of the mailbox vector. It resets a VF whose
// messages the PF no longer heeds.
func (g *guest) heedPF() {
	g.read(ixgbevf.VTEICR)
	g.write(ixgbevf.VTEIMS, ixgbevf.VectorMask)
	g.readMailbox()
	if g.bits&ixgbevf.MailboxPFSTS != 0 {
		g.bits &^= ixgbevf.MailboxPFSTS
		g.read(ixgbevf.VFMBMEM)
		g.write(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
	}
	g.read(ixgbevf.VFLINKS)
	if g.revoked {
		g.resetHandshake()
		g.revoked = false
		g.bringUp()
	}
}
