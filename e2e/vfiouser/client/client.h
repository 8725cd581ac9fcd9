// What the parts of the client share.

#define _GNU_SOURCE
#include <errno.h>
#include <linux/memfd.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { TIMEOUT_MS = 10000, MAX_FDS = 32, BODY_MAX = 4096 };

// Commands and flags of the specification.
enum {
	VERSION = 1, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO,
	SET_IRQS, REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, DEVICE_RESET, REGION_WRITE_MULTI = 15,
};
enum { F_REPLY = 1, F_NO_REPLY = 0x10, F_ERROR = 0x20 };

struct header {
	uint16_t id, cmd;
	uint32_t size, flags, error;
};

struct dma_map {
	uint32_t argsz, flags;
	uint64_t offset, addr, size;
};

struct dma_unmap {
	uint32_t argsz, flags;
	uint64_t addr, size;
};

struct access {
	uint64_t offset;
	uint32_t region, count;
};

struct dma_access {
	uint64_t address, count;
};

// Guest memory: rings and buffers at fixed places.
enum { RAM = 1 << 20, RAM_AT = 0x100000, RX_RING = 0x1000, TX_RING = 0x2000, RX_BUFFERS = 0x10000, TX_BUFFERS = 0x40000 };

extern int sock;
extern uint8_t *ram;

__attribute__((format(printf, 1, 2), noreturn)) void die(const char *format, ...);
bool send_raw(const void *p, size_t n, const int *fds, int nfds);
bool recv_all(void *p, size_t n);
void wr(uint32_t region, uint64_t offset, uint32_t count, uint64_t v);

// bring_up connects guest memory and interrupts, and has the driver send and
// receive; drive has it do so again, from a reset on.
void bring_up(void);
void drive(void);

// serve_request answers a request of the server, whose header was received.
// False: the session is over.
bool serve_request(const struct header *h);
void serve(void);
