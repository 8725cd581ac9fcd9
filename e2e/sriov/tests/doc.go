// Package tests holds the tests that run inside a VM with emulated SR-IOV
// cards, on the kernel's own drivers. See package node for the VM.
package tests
