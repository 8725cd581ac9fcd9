// Package drivers holds the tests of unmodified drivers: the ixgbevf of each
// distribution kernel that package guest boots, with one CPU and with several,
// moved under traffic while everything is changed that its users can change:
// VLANs, multicast groups, flags, frame size, rings, interrupt moderation,
// offloads, the interface's state and the module itself. They run as root, with
// the build tag e2edrivers, and build the product themselves.
//
// After each change and after each hop, what the guest is to receive is told
// from what it asked for and what a PF of the 82599 grants (ixgbe_sriov.c),
// and compared with what it does receive. One thing that users of other NICs
// expect is not there: an 82599 has no promiscuous VFs. Its PF refuses the
// mode to a trusted VF and gives an untrusted one its multicast groups.
package drivers
