// Package tests holds the end-to-end tests: the product's processes, stock
// QEMU and a real guest, on what package harness puts together. They run as
// root, with the build tag e2e. COMPSC_BINARY names a product built with the tag
// demo; without it they build one.
package tests
