// Package guest holds the test that boots the guest of package init alone, on
// an emulated network card of QEMU: what fails there is no fault of the product.
package guest
