// Package ipxe moves a VM whose driver is not Linux's: iPXE's intelxvf, which
// polls, takes no interrupts, has rings of 16 descriptors of which it fills 8,
// receives with legacy descriptors and transmits with advanced ones. The VM
// runs Debian's unmodified iPXE, which downloads files from the hub while it
// is moved, and boots Linux in the end, whose ixgbevf takes over the same VF.
//
// The server that iPXE downloads from decides how long a download takes, so
// that each one lasts as long as a migration does. What was downloaded is
// compared with what was sent in the VM's RAM, byte by byte, by the test and
// not by anything in the guest.
//
// The tests run as root, with the build tag e2edrivers.
package ipxe
