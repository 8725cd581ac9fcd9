// Package vfiouser tests a device process with a vfio-user client that is not
// QEMU and shares nothing with the server: client/client.c, which takes its
// structures from the kernel's <linux/vfio.h> and the rest from the
// specification. The client drives the VF as a small driver would, and breaks
// the protocol in every way it knows.
package vfiouser
