// Package tests holds the end-to-end tests: the product's processes, stock
// QEMU and a real guest, on what package harness puts together. They run as
// root, with the build tag e2e, and build the product themselves.
package tests
