// Package nested holds the test that moves a second-level guest: inside a VM
// with emulated SR-IOV cards it runs QEMU, under that VM's KVM, with a VF of a
// card that `compsc device` mediates through vfio-pci. The guest is Debian's,
// with its unmodified igbvf driver. The test plays both nodes' agents, KubeVirt
// and libvirt.
package nested
