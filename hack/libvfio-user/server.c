/*
 * A device on libvfio-user, the C library that is the protocol's reference, for
 * the benchmark to be measured beside: BAR0 is memory, as much as the VF has.
 * Usage: server SOCKET. It serves one client and ends with it.
 */
#include <err.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "libvfio-user.h"

static char registers[0x4000];

static ssize_t
bar0(vfu_ctx_t *vfu, char *buf, size_t count, loff_t offset, bool is_write)
{
	(void)vfu; /* offset and count are within the region */
	if (is_write)
		memcpy(registers + offset, buf, count);
	else
		memcpy(buf, registers + offset, count);
	return (ssize_t)count;
}

int
main(int argc, char **argv)
{
	vfu_ctx_t *vfu;

	if (argc != 2)
		errx(EXIT_FAILURE, "usage: %s SOCKET", argv[0]);
	vfu = vfu_create_ctx(VFU_TRANS_SOCK, argv[1], 0, NULL, VFU_DEV_TYPE_PCI);
	if (vfu == NULL)
		err(EXIT_FAILURE, "vfu_create_ctx");
	if (vfu_pci_init(vfu, VFU_PCI_TYPE_EXPRESS, PCI_HEADER_TYPE_NORMAL, 0) < 0)
		err(EXIT_FAILURE, "vfu_pci_init");
	if (vfu_setup_region(vfu, VFU_PCI_DEV_BAR0_REGION_IDX, sizeof(registers), bar0,
	    VFU_REGION_FLAG_RW, NULL, 0, -1, 0) < 0)
		err(EXIT_FAILURE, "vfu_setup_region");
	if (vfu_realize_ctx(vfu) < 0)
		err(EXIT_FAILURE, "vfu_realize_ctx");
	puts("ready");
	fflush(stdout);
	if (vfu_attach_ctx(vfu) < 0)
		err(EXIT_FAILURE, "vfu_attach_ctx");
	while (vfu_run_ctx(vfu) >= 0 || errno == EINTR)
		;
	return errno == ENOTCONN ? EXIT_SUCCESS : EXIT_FAILURE;
}
