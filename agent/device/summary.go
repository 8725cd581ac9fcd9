package device

import (
	"net"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/family"
)

// summaryOf is the mailbox record's summary as the source told it.
func summaryOf(s *pb.SourceInterface) family.Summary {
	mac, err := net.ParseMAC(s.Mac)
	if err != nil {
		mac = nil // compared as text already
	}
	return family.Summary{API: s.MailboxApi, MulticastFilterType: s.MulticastFilterType, MAC: mac, NotMigratable: s.NotMigratable}
}
