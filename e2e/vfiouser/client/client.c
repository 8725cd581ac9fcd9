// A vfio-user client that shares nothing with the server it tests: another
// language, the structures from the kernel's <linux/vfio.h>, the rest from the
// vfio-user specification (docs/interop/vfio-user.rst in QEMU's source tree).
//
// Usage: client SOCKET talk        drive the VF as a small driver would
//        client SOCKET bad CASE    break the protocol, say how it was answered
//        client SOCKET stall CASE  send a part, and wait for the end of the session
//        client SOCKET serve       answer the server's requests, as told on stdin
//        client - cases            list the cases of bad
//
// talk ends with status 0 when every answer was right. bad prints one line:
// "error ERRNO" for an error reply, "closed" when the server ended the session,
// "accepted" for a normal reply, "ignored" when the session went on without one.
// stall has the cases silent, header, body and negotiated, and prints "closed".
// For serve see serve.c.

#include "client.h"

int sock;
uint8_t *ram;
static int events[3];
static uint16_t next_id;

void die(const char *format, ...) {
	va_list args;
	va_start(args, format);
	fprintf(stderr, "client: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	exit(1);
}

static uint64_t now_ms(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void dial(const char *path) {
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof a.sun_path) die("path %s is too long", path);
	strcpy(a.sun_path, path);
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0 || connect(sock, (struct sockaddr *)&a, sizeof a)) die("connect to %s: %m", path);
}

// send_raw sends n bytes with descriptors; false when the server has gone.
bool send_raw(const void *p, size_t n, const int *fds, int nfds) {
	char control[CMSG_SPACE(MAX_FDS * sizeof(int))] = {0};
	struct iovec v = {.iov_base = (void *)p, .iov_len = n};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
	if (nfds) {
		m.msg_control = control;
		m.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
		memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
	}
	while (v.iov_len) {
		ssize_t k = sendmsg(sock, &m, MSG_NOSIGNAL);
		if (k < 0 && (errno == EPIPE || errno == ECONNRESET)) return false;
		if (k < 0) die("send: %m");
		v.iov_base = (char *)v.iov_base + k;
		v.iov_len -= k;
		m.msg_control = NULL;
		m.msg_controllen = 0;
	}
	return true;
}

// recv_all returns false at the end of the session, and dies of silence.
bool recv_all(void *p, size_t n) {
	uint64_t until = now_ms() + TIMEOUT_MS;
	for (char *at = p; n;) {
		int64_t left = until - now_ms();
		struct pollfd f = {.fd = sock, .events = POLLIN};
		if (left <= 0 || poll(&f, 1, left) == 0) die("the server did not answer within %d ms", TIMEOUT_MS);
		ssize_t k = recv(sock, at, n, 0);
		if (k == 0 || (k < 0 && errno == ECONNRESET)) return false;
		if (k < 0) die("receive: %m");
		at += k;
		n -= k;
	}
	return true;
}

static bool send_message(uint16_t cmd, uint32_t flags, const void *body, size_t n, const int *fds, int nfds) {
	char b[sizeof(struct header) + BODY_MAX];
	struct header h = {.id = ++next_id, .cmd = cmd, .size = sizeof h + n, .flags = flags};
	if (n > BODY_MAX) die("a body of %zu bytes is too long", n);
	memcpy(b, &h, sizeof h);
	memcpy(b + sizeof h, body, n);
	return send_raw(b, sizeof h + n, fds, nfds);
}

// receive_reply returns the body's size, or -1 for an error reply, whose number
// is in *error, or -2 at the end of the session.
static int receive_reply(uint16_t cmd, void *body, size_t max, uint32_t *error) {
	struct header h;
	do { // the server may ask something before it answers
		if (!recv_all(&h, sizeof h)) return -2;
		if ((h.flags & 0xf) == F_REPLY) break;
	} while (serve_request(&h));
	if ((h.flags & 0xf) != F_REPLY) return -2;
	if (h.id != next_id || h.cmd != cmd || (h.flags & 0xf) != F_REPLY) die("command %u id %u was answered by command %u id %u flags %#x", cmd, next_id, h.cmd, h.id, h.flags);
	if (h.size < sizeof h || h.size - sizeof h > max) die("the answer to command %u has %u bytes", cmd, h.size);
	int n = h.size - sizeof h;
	if (!recv_all(body, n)) return -2;
	if (h.flags & F_ERROR) {
		*error = h.error;
		return -1;
	}
	return n;
}

// call sends a command and returns the size of its reply, which must be none
// of error.
static int call(uint16_t cmd, const void *body, size_t n, const int *fds, int nfds, void *reply, size_t max) {
	uint32_t error;
	if (!send_message(cmd, 0, body, n, fds, nfds)) die("command %u: the session is over", cmd);
	int k = receive_reply(cmd, reply, max, &error);
	if (k == -1) die("command %u: %s", cmd, strerror(error));
	if (k < 0) die("command %u: the server ended the session", cmd);
	return k;
}

static const char offer[] = "\0\0\1\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,\"migration\":{\"pgsize\":4096}}}";

static void negotiate(void) {
	char r[BODY_MAX] = {0};
	int n = call(VERSION, offer, sizeof offer, NULL, 0, r, sizeof r - 1);
	uint16_t major, minor;
	if (n < 5) die("VERSION was answered with %d bytes", n);
	memcpy(&major, r, 2);
	memcpy(&minor, r + 2, 2);
	if (major != 0 || minor > 1) die("the server speaks %u.%u", major, minor);
	if (r[n - 1] != 0 || !strstr(r + 4, "\"capabilities\"")) die("VERSION has no capabilities: %s", r + 4);
}

static uint64_t rd(uint32_t region, uint64_t offset, uint32_t count) {
	struct access a = {offset, region, count};
	char r[sizeof a + 8];
	uint64_t v = 0;
	int n = call(REGION_READ, &a, sizeof a, NULL, 0, r, sizeof r);
	if (n != (int)(sizeof a + count) || memcmp(r, &a, sizeof a)) die("the read of region %u at %#lx was answered with %d bytes for another access", region, offset, n);
	memcpy(&v, r + sizeof a, count);
	return v;
}

static void wr_flags(uint32_t region, uint64_t offset, uint32_t count, uint64_t v, bool posted) {
	struct access a = {offset, region, count};
	char b[sizeof a + 8], r[sizeof a];
	memcpy(b, &a, sizeof a);
	memcpy(b + sizeof a, &v, count);
	if (posted) {
		if (!send_message(REGION_WRITE, F_NO_REPLY, b, sizeof a + count, NULL, 0)) die("posted write: the session is over");
		return;
	}
	int n = call(REGION_WRITE, b, sizeof a + count, NULL, 0, r, sizeof r);
	if (n != sizeof a || memcmp(r, &a, sizeof a)) die("the write of region %u at %#lx was answered with %d bytes for another access", region, offset, n);
}

void wr(uint32_t region, uint64_t offset, uint32_t count, uint64_t v) { wr_flags(region, offset, count, v, false); }

static uint32_t get(uint32_t offset) { return rd(VFIO_PCI_BAR0_REGION_INDEX, offset, 4); }
static void set(uint32_t offset, uint32_t v) { wr_flags(VFIO_PCI_BAR0_REGION_INDEX, offset, 4, v, true); }

#define UNTIL(condition)                                                                  \
	do {                                                                              \
		uint64_t until_ = now_ms() + TIMEOUT_MS;                                  \
		while (!(condition))                                                      \
			if (now_ms() > until_) die("%s:%d: timed out: %s", __func__, __LINE__, #condition); \
	} while (0)

static void check_description(void) {
	struct vfio_device_info d = {.argsz = 16}, dr = {0};
	if (call(GET_INFO, &d, 16, NULL, 0, &dr, sizeof dr) != 16) die("GET_INFO: size");
	if (dr.argsz != 16 || !(dr.flags & VFIO_DEVICE_FLAGS_PCI) || !(dr.flags & VFIO_DEVICE_FLAGS_RESET)) die("GET_INFO: argsz %u, flags %#x", dr.argsz, dr.flags);
	if (dr.num_regions < VFIO_PCI_NUM_REGIONS - 1 || dr.num_irqs < VFIO_PCI_MSIX_IRQ_INDEX + 1) die("GET_INFO: %u regions, %u interrupt types", dr.num_regions, dr.num_irqs);
	for (uint32_t i = 0; i < dr.num_regions; i++) {
		struct vfio_region_info q = {.argsz = sizeof q, .index = i}, r = {0};
		if (call(GET_REGION_INFO, &q, sizeof q, NULL, 0, &r, sizeof r) != sizeof r) die("GET_REGION_INFO %u: size", i);
		if (r.argsz != sizeof r || r.index != i || r.cap_offset != 0) die("GET_REGION_INFO %u: argsz %u, index %u, capabilities at %u", i, r.argsz, r.index, r.cap_offset);
		uint32_t rw = r.flags & (VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE);
		bool want = i == VFIO_PCI_BAR0_REGION_INDEX || i == VFIO_PCI_CONFIG_REGION_INDEX;
		if (want && (r.size < 256 || rw != (VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE))) die("region %u: %llu bytes, flags %#x", i, r.size, r.flags);
	}
	for (uint32_t i = 0; i < dr.num_irqs; i++) {
		struct vfio_irq_info q = {.argsz = sizeof q, .index = i}, r = {0};
		if (call(GET_IRQ_INFO, &q, sizeof q, NULL, 0, &r, sizeof r) != sizeof r || r.index != i) die("GET_IRQ_INFO %u", i);
		if (i == VFIO_PCI_MSIX_IRQ_INDEX && (r.count != 3 || !(r.flags & VFIO_IRQ_INFO_EVENTFD))) die("MSI-X: %u vectors, flags %#x", r.count, r.flags);
	}
	uint32_t id = rd(VFIO_PCI_CONFIG_REGION_INDEX, PCI_VENDOR_ID, 4);
	if (id != 0x10ed8086) die("the device is %08x", id);
	int cap = rd(VFIO_PCI_CONFIG_REGION_INDEX, PCI_CAPABILITY_LIST, 1), seen = 0, hops = 0;
	for (; cap && hops < 48; hops++) {
		uint16_t c = rd(VFIO_PCI_CONFIG_REGION_INDEX, cap, 2);
		if ((c & 0xff) == PCI_CAP_ID_MSIX) {
			seen = 1 + (rd(VFIO_PCI_CONFIG_REGION_INDEX, cap + PCI_MSIX_FLAGS, 2) & PCI_MSIX_FLAGS_QSIZE);
		}
		cap = c >> 8;
	}
	if (cap || seen != 3) die("the capability list shows %d MSI-X vectors after %d hops", seen, hops);
	wr(VFIO_PCI_CONFIG_REGION_INDEX, PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
}

// The 82599 VF's registers and descriptors (Linux: ixgbevf/regs.h, defines.h).
enum {
	VTCTRL = 0x0, VTEIMS = 0x108, VTEIAC = 0x110, VTIVAR0 = 0x120, VFMBMEM = 0x200, VFMAILBOX = 0x2fc,
	RDBAL = 0x1000, RDBAH = 0x1004, RDLEN = 0x1008, RDH = 0x1010, SRRCTL = 0x1014, RDT = 0x1018, RXDCTL = 0x1028,
	TDBAL = 0x2000, TDBAH = 0x2004, TDLEN = 0x2008, TDH = 0x2010, TDT = 0x2018, TXDCTL = 0x2028,
	MB_REQ = 1, MB_ACK = 2, MB_VFU = 4, MB_PFSTS = 0x10, MB_PFACK = 0x20, MB_RSTD = 0x80,
	VFGPRC = 0x101c, VFGPTC = 0x201c,
	QUEUE_ENABLE = 1 << 25, RING = 32, FRAMES = 100, FRAME = 60,
};

// As the driver writes a descriptor. The device writes the status of what it
// sent to olinfo, that of what it received to command, with the length in the
// low half of olinfo.
struct descriptor {
	uint64_t address;
	uint32_t command, olinfo;
};

static void reset_vf(uint8_t mac[6]) {
	set(VTCTRL, 1 << 26);
	UNTIL(get(VFMAILBOX) & MB_RSTD);
	UNTIL((set(VFMAILBOX, MB_VFU), get(VFMAILBOX) & MB_VFU));
	set(VFMBMEM, 1); // VF_RESET
	set(VFMAILBOX, MB_REQ);
	uint32_t seen = 0; // the bits are cleared by the read
	UNTIL(((seen |= get(VFMAILBOX)) & (MB_PFACK | MB_PFSTS)) == (MB_PFACK | MB_PFSTS));
	UNTIL((set(VFMAILBOX, MB_VFU), get(VFMAILBOX) & MB_VFU));
	uint32_t words[3];
	for (int i = 0; i < 3; i++) words[i] = get(VFMBMEM + 4 * i);
	set(VFMAILBOX, MB_ACK);
	if (words[0] != 0x80000001) die("the PF answers the reset with %08x", words[0]);
	memcpy(mac, &words[1], 6);
}

// traffic sends frames and gets each of them back from the wire's other end,
// which must exchange the addresses.
static void traffic(const uint8_t mac[6], int event) {
	volatile struct descriptor *rx = (void *)(ram + RX_RING), *tx = (void *)(ram + TX_RING);
	set(RDBAL, RAM_AT + RX_RING), set(RDBAH, 0), set(RDLEN, RING * 16), set(RDH, 0), set(RDT, 0);
	set(SRRCTL, 2 | 1 << 25); // 2 KiB, advanced descriptors
	set(RXDCTL, QUEUE_ENABLE);
	UNTIL(get(RXDCTL) & QUEUE_ENABLE);
	for (int i = 0; i < RING; i++) rx[i] = (struct descriptor){RAM_AT + RX_BUFFERS + i * 2048, 0, 0};
	set(RDT, RING - 1);
	set(TDBAL, RAM_AT + TX_RING), set(TDBAH, 0), set(TDLEN, RING * 16), set(TDH, 0), set(TDT, 0);
	set(TXDCTL, QUEUE_ENABLE);
	UNTIL(get(TXDCTL) & QUEUE_ENABLE);
	set(VTIVAR0, 0x8080); // both queues 0: vector 0
	set(VTEIAC, 7), set(VTEIMS, 7);
	uint32_t sent = get(VFGPTC), received = get(VFGPRC); // no reset clears them
	for (int i = 0; i < FRAMES; i++) {
		int slot = i % RING;
		volatile uint8_t *f = ram + TX_BUFFERS + slot * 2048;
		for (int k = 0; k < FRAME; k++) f[k] = i + k;
		for (int k = 0; k < 6; k++) f[k] = 2, f[6 + k] = mac[k];
		f[12] = 0x88, f[13] = 0xb5; // local experimental EtherType
		tx[slot] = (struct descriptor){RAM_AT + TX_BUFFERS + slot * 2048,
			1 << 29 | 1 << 27 | 1 << 25 | 1 << 24 | 3 << 20 | FRAME, FRAME << 14}; // DEXT, RS, IFCS, EOP, data
		__sync_synchronize();
		set(TDT, (i + 1) % RING);
		UNTIL(tx[slot].olinfo & 1); // DD
		UNTIL(rx[slot].command & 1);
		__sync_synchronize();
		if ((rx[slot].olinfo & 0xffff) != FRAME) die("frame %d came back with %u bytes", i, rx[slot].olinfo & 0xffff);
		const volatile uint8_t *back = ram + RX_BUFFERS + slot * 2048;
		for (int k = 14; k < FRAME; k++)
			if (back[k] != (uint8_t)(i + k)) die("frame %d came back with %02x at %d", i, back[k], k);
		for (int k = 0; k < 6; k++)
			if (back[k] != mac[k]) die("frame %d came back to another address", i);
		rx[slot] = (struct descriptor){RAM_AT + RX_BUFFERS + slot * 2048, 0, 0};
		__sync_synchronize();
		set(RDT, slot);
	}
	uint64_t count = 0;
	struct pollfd p = {.fd = event, .events = POLLIN};
	if (poll(&p, 1, TIMEOUT_MS) != 1 || read(event, &count, 8) != 8 || count == 0) die("no interrupt came");
	sent = get(VFGPTC) - sent, received = get(VFGPRC) - received;
	if (sent != FRAMES || received != FRAMES) die("the counters say %u sent, %u received", sent, received);
}

static int memory(size_t size) {
	int fd = memfd_create("guest", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, size)) die("memfd: %m");
	return fd;
}

void drive(void) {
	uint8_t mac[6];
	reset_vf(mac);
	traffic(mac, events[0]);
}

void bring_up(void) {
	char r[BODY_MAX];
	int ram_fd = memory(RAM);
	ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
	if (ram == MAP_FAILED) die("mmap: %m");
	struct dma_map map = {sizeof map, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE, 0, RAM_AT, RAM};
	call(DMA_MAP, &map, sizeof map, &ram_fd, 1, r, sizeof r);
	close(ram_fd); // the server has its own

	for (int i = 0; i < 3; i++)
		if ((events[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) die("eventfd: %m");
	struct vfio_irq_set irqs = {sizeof irqs, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_MSIX_IRQ_INDEX, 0, 3};
	call(SET_IRQS, &irqs, sizeof irqs, events, 3, r, sizeof r);
	drive();
}

// One write of REGION_WRITE_MULTI.
struct one_write {
	struct access a;
	uint8_t data[8];
};

// write_multi has three registers written by one message, in their order.
static void write_multi(void) {
	struct {
		uint64_t count;
		struct one_write w[3];
	} m = {3, {
		{{VFMBMEM, VFIO_PCI_BAR0_REGION_INDEX, 4}, {0x11, 0x22, 0x33, 0x44}},
		{{VFMBMEM + 4, VFIO_PCI_BAR0_REGION_INDEX, 8}, {1, 2, 3, 4, 5, 6, 7, 8}},
		{{VFMBMEM, VFIO_PCI_BAR0_REGION_INDEX, 4}, {0x55, 0x66, 0x77, 0x88}},
	}};
	uint64_t done = 0;
	set(VFMAILBOX, MB_VFU);
	int n = call(REGION_WRITE_MULTI, &m, sizeof m, NULL, 0, &done, sizeof done);
	if (n != sizeof done || done != m.count) die("REGION_WRITE_MULTI: %d bytes say that %lu of %lu writes were done", n, done, m.count);
	uint32_t got[3];
	for (int i = 0; i < 3; i++) got[i] = get(VFMBMEM + 4 * i);
	if (got[0] != 0x88776655 || got[1] != 0x04030201 || got[2] != 0x08070605) die("REGION_WRITE_MULTI left %08x %08x %08x", got[0], got[1], got[2]);
	set(VFMAILBOX, 0);
}

static void talk(void) {
	char r[BODY_MAX];
	negotiate();
	check_description();
	bring_up();
	write_multi();

	call(DEVICE_RESET, NULL, 0, NULL, 0, r, sizeof r);
	if ((get(RXDCTL) | get(TXDCTL)) & QUEUE_ENABLE) die("the reset left RXDCTL %08x, TXDCTL %08x, TDLEN %u", get(RXDCTL), get(TXDCTL), get(TDLEN));
	struct vfio_irq_set irqs = {sizeof irqs, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_MSIX_IRQ_INDEX, 0, 0};
	call(SET_IRQS, &irqs, sizeof irqs, NULL, 0, r, sizeof r);
	struct dma_unmap unmap = {sizeof unmap, 0, RAM_AT, RAM};
	if (call(DMA_UNMAP, &unmap, sizeof unmap, NULL, 0, r, sizeof r) != sizeof unmap) die("DMA_UNMAP: size");
	printf("ok\n");
}

// What is sent in a case of bad behaviour.
struct bad {
	const char *name;
	bool raw;      // bytes as they are, without negotiation
	bool cut;      // close the writing side after it
	uint16_t cmd;
	uint32_t flags;
	const void *body;
	size_t size;
	int nfds;
	enum { MEMORY, EVENT, PIPE } fds;
};

#define BODY(type, ...) .body = &(const type){__VA_ARGS__}, .size = sizeof(type)
#define WORDS(...) .body = (const uint32_t[]){__VA_ARGS__}, .size = sizeof((const uint32_t[]){__VA_ARGS__})
#define HEADER(...) .raw = true, BODY(struct header, __VA_ARGS__)
#define BYTES(s) .raw = true, .body = s, .size = sizeof s - 1
#define EVENTS VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER
#define MSIX VFIO_PCI_MSIX_IRQ_INDEX

static const struct bad cases[] = {
	// The header.
	{"size-0", HEADER(1, VERSION, 0, 0, 0)},
	{"size-below-header", HEADER(1, VERSION, 15, 0, 0)},
	{"size-4GiB", HEADER(1, VERSION, 0xffffffff, 0, 0)},
	{"size-2MiB", HEADER(1, VERSION, 2 << 20, 0, 0)},
	{"type-unknown", HEADER(1, VERSION, 16, 2, 0)},
	{"half-a-header", .cut = true, BYTES("\1\0\1\0\24\0\0\0")},
	{"half-a-body", .cut = true, HEADER(1, VERSION, 64, 0, 0)},
	{"reply-unasked", .cmd = DMA_READ, .flags = F_REPLY, BODY(struct access, 0, 0, 0)},
	{"command-unknown", .cmd = 99},
	{"command-0", .cmd = 0},
	// Negotiation.
	{"before-version", HEADER(1, GET_INFO, 16, 0, 0)},
	{"version-twice", .cmd = VERSION, .body = offer, .size = sizeof offer},
	{"version-5", BYTES("\1\0\1\0\24\0\0\0\0\0\0\0\0\0\0\0\5\0\0\0")},
	{"version-no-body", HEADER(1, VERSION, 16, 0, 0)},
	{"version-no-nul", BYTES("\1\0\1\0\26\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0{}")},
	{"version-no-json", BYTES("\1\0\1\0\30\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0]x[\0")},
	// Queries.
	{"info-short", .cmd = GET_INFO, WORDS(16)},
	{"info-argsz", .cmd = GET_INFO, WORDS(4, 0, 0, 0)},
	{"region-77", .cmd = GET_REGION_INFO, WORDS(32, 0, 77, 0, 0, 0, 0, 0)},
	{"irq-77", .cmd = GET_IRQ_INFO, WORDS(16, 0, 77, 0)},
	{"io-fds", .cmd = GET_REGION_IO_FDS, WORDS(16, 0, 0, 0)},
	// Regions.
	{"read-short", .cmd = REGION_READ, WORDS(0, 0)},
	{"read-nothing", .cmd = REGION_READ, BODY(struct access, 0, 0, 0)},
	{"read-beyond", .cmd = REGION_READ, BODY(struct access, 0x7fffffff, 0, 4)},
	{"read-across", .cmd = REGION_READ, BODY(struct access, 254, VFIO_PCI_CONFIG_REGION_INDEX, 4096)},
	{"read-overflow", .cmd = REGION_READ, BODY(struct access, UINT64_MAX - 1, 0, 4)},
	{"read-4GiB", .cmd = REGION_READ, BODY(struct access, 0, 0, 0xffffffff)},
	{"read-region-77", .cmd = REGION_READ, BODY(struct access, 0, 77, 4)},
	{"read-no-region", .cmd = REGION_READ, BODY(struct access, 0, VFIO_PCI_ROM_REGION_INDEX, 4)},
	{"write-no-data", .cmd = REGION_WRITE, BODY(struct access, 0, 0, 4)},
	{"write-more-data", .cmd = REGION_WRITE, WORDS(0, 0, 0, 4, 1, 2)},
	{"write-beyond", .cmd = REGION_WRITE, WORDS(0xffffff00, 0, 0, 4, 1)},
	{"multi-short", .cmd = REGION_WRITE_MULTI, WORDS(1)},
	{"multi-nothing", .cmd = REGION_WRITE_MULTI, WORDS(0, 0)},
	{"multi-fewer", .cmd = REGION_WRITE_MULTI, WORDS(2, 0, VFMBMEM, 0, 0, 4, 1, 0)},
	{"multi-more", .cmd = REGION_WRITE_MULTI, WORDS(1, 0, VFMBMEM, 0, 0, 4, 1, 0, VFMBMEM, 0, 0, 4, 1, 0)},
	{"multi-cut", .cmd = REGION_WRITE_MULTI, WORDS(1, 0, VFMBMEM, 0, 0, 4, 1)},
	{"multi-2^61", .cmd = REGION_WRITE_MULTI, WORDS(0, 1u << 29, VFMBMEM, 0, 0, 4, 1, 0)},
	{"multi-9-bytes", .cmd = REGION_WRITE_MULTI, WORDS(1, 0, VFMBMEM, 0, 0, 9, 1, 0)},
	{"multi-beyond", .cmd = REGION_WRITE_MULTI, WORDS(1, 0, 0xffffff00, 0, 0, 4, 1, 0)},
	{"multi-second-beyond", .cmd = REGION_WRITE_MULTI, WORDS(2, 0, VFMBMEM, 0, 0, 4, 1, 0, VFMBMEM, 0, 77, 4, 1, 0)},
	// Memory.
	{"map-short", .cmd = DMA_MAP, WORDS(32, 3, 0)},
	{"map-nothing", .cmd = DMA_MAP, BODY(struct dma_map, 32, 3, 0, 0x1000, 0), .nfds = 1},
	{"map-overflow", .cmd = DMA_MAP, BODY(struct dma_map, 32, 3, 0, UINT64_MAX - 4095, 8192), .nfds = 1},
	{"map-flags", .cmd = DMA_MAP, BODY(struct dma_map, 32, 0xff, 0, 0x1000, 4096), .nfds = 1},
	{"map-two-descriptors", .cmd = DMA_MAP, BODY(struct dma_map, 32, 3, 0, 0x1000, 4096), .nfds = 2},
	{"map-a-pipe", .cmd = DMA_MAP, BODY(struct dma_map, 32, 3, 0, 0x1000, 4096), .nfds = 1, .fds = PIPE},
	{"map-offset-overflow", .cmd = DMA_MAP, BODY(struct dma_map, 32, 3, UINT64_MAX - 4095, 0x1000, 8192), .nfds = 1},
	{"unmap-nothing", .cmd = DMA_UNMAP, BODY(struct dma_unmap, 24, 0, 0, 0)},
	{"unmap-unknown", .cmd = DMA_UNMAP, BODY(struct dma_unmap, 24, 0, 0x1000, 4096)},
	{"unmap-overflow", .cmd = DMA_UNMAP, BODY(struct dma_unmap, 24, 0, UINT64_MAX, 2)},
	{"unmap-dirty-pages", .cmd = DMA_UNMAP, BODY(struct dma_unmap, 24, 1, 0x1000, 4096)},
	// Interrupts.
	{"irqs-short", .cmd = SET_IRQS, WORDS(20, EVENTS)},
	{"irqs-index-77", .cmd = SET_IRQS, WORDS(20, EVENTS, 77, 0, 1), .nfds = 1, .fds = EVENT},
	{"irqs-too-many", .cmd = SET_IRQS, WORDS(20, EVENTS, MSIX, 1, 3), .nfds = 3, .fds = EVENT},
	{"irqs-overflow", .cmd = SET_IRQS, WORDS(20, EVENTS, MSIX, 0xffffffff, 2), .nfds = 2, .fds = EVENT},
	{"irqs-two-kinds", .cmd = SET_IRQS, WORDS(20, EVENTS | VFIO_IRQ_SET_DATA_BOOL, MSIX, 0, 1)},
	{"irqs-two-actions", .cmd = SET_IRQS, WORDS(20, EVENTS | VFIO_IRQ_SET_ACTION_MASK, MSIX, 0, 1)},
	{"irqs-few-descriptors", .cmd = SET_IRQS, WORDS(20, EVENTS, MSIX, 0, 3), .nfds = 2, .fds = EVENT},
	{"irqs-no-eventfd", .cmd = SET_IRQS, WORDS(20, EVENTS, MSIX, 0, 1), .nfds = 1, .fds = MEMORY},
	{"irqs-bools-short", .cmd = SET_IRQS, WORDS(20, VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_ACTION_TRIGGER, MSIX, 0, 3)},
	// Descriptors where none belong.
	{"read-with-descriptor", .cmd = REGION_READ, BODY(struct access, 8, 0, 4), .nfds = 1},
	{"reset-with-descriptors", .cmd = DEVICE_RESET, .nfds = 8, .fds = EVENT},
	{"too-many-descriptors", .cmd = SET_IRQS, WORDS(20, EVENTS, MSIX, 0, 3), .nfds = 30, .fds = EVENT},
	{"reset-with-body", .cmd = DEVICE_RESET, WORDS(1)},
};
enum { CASES = sizeof cases / sizeof cases[0] };

static int some_descriptor(int kind) {
	int pair[2], fd;
	switch (kind) {
	case EVENT: fd = eventfd(0, EFD_CLOEXEC); break;
	case PIPE:
		if (pipe(pair)) die("pipe: %m");
		return pair[0];
	default: fd = memory(1 << 16);
	}
	if (fd < 0) die("a descriptor: %m");
	return fd;
}

static void bad(const char *name) {
	const struct bad *b = NULL;
	for (int i = 0; i < CASES; i++)
		if (!strcmp(cases[i].name, name)) b = &cases[i];
	if (!b) die("there is no case %s", name);
	int fds[MAX_FDS];
	for (int i = 0; i < b->nfds; i++) fds[i] = some_descriptor(b->fds);
	uint16_t cmd = b->cmd;
	bool sent;
	if (b->raw) {
		memcpy(&cmd, (const char *)b->body + 2, 2);
		memcpy(&next_id, b->body, 2);
		sent = send_raw(b->body, b->size, NULL, 0);
	} else {
		negotiate();
		sent = send_message(cmd, b->flags, b->body, b->size, fds, b->nfds);
	}
	if (b->cut && shutdown(sock, SHUT_WR)) die("shutdown: %m");
	char reply[BODY_MAX];
	uint32_t error = 0;
	if (b->flags & F_REPLY) { // has no answer; what comes after it has
		rd(VFIO_PCI_CONFIG_REGION_INDEX, PCI_VENDOR_ID, 4);
		printf("ignored\n");
		return;
	}
	int n = sent ? receive_reply(cmd, reply, sizeof reply, &error) : -2;
	if (n == -2) {
		printf("closed\n");
	} else if (n == -1) {
		printf("error %s\n", strerrorname_np(error));
	} else {
		printf("accepted\n");
	}
	// After an error the session either is over or still works.
	if (n == -1 && !b->raw) {
		struct access a = {PCI_VENDOR_ID, VFIO_PCI_CONFIG_REGION_INDEX, 4};
		if (send_message(REGION_READ, 0, &a, sizeof a, NULL, 0) && receive_reply(REGION_READ, reply, sizeof reply, &error) == -1) die("after the error reads fail too: %s", strerror(error));
	}
}

// How long the server may take to end a session that does not go on.
enum { STALL_MS = 30000 };

static void stall(const char *name) {
	struct header h = {1, VERSION, sizeof h + sizeof offer, 0, 0};
	size_t n = 0;
	if (!strcmp(name, "header")) {
		n = sizeof h / 2;
	} else if (!strcmp(name, "body")) {
		n = sizeof h;
	} else if (!strcmp(name, "negotiated")) {
		negotiate();
		h = (struct header){9, REGION_READ, sizeof h + sizeof(struct access), 0, 0};
		n = sizeof h;
	} else if (strcmp(name, "silent")) {
		die("there is no case %s", name);
	}
	if (n && !send_raw(&h, n, NULL, 0)) die("the session is over already");
	struct pollfd f = {.fd = sock, .events = POLLIN};
	char c;
	if (poll(&f, 1, STALL_MS) != 1) die("the server waits for more than %d ms", STALL_MS);
	ssize_t k = recv(sock, &c, 1, 0);
	if (k > 0) die("an answer to a part of a message");
	printf("closed\n");
}

int main(int argc, char **argv) {
	if (argc == 3 && !strcmp(argv[2], "cases")) {
		for (int i = 0; i < CASES; i++) puts(cases[i].name);
		return 0;
	}
	if (argc < 3) die("usage: client SOCKET talk | client SOCKET bad CASE | client SOCKET stall CASE | client SOCKET serve | client - cases");
	dial(argv[1]);
	if (!strcmp(argv[2], "talk")) {
		talk();
	} else if (!strcmp(argv[2], "bad") && argc == 4) {
		bad(argv[3]);
	} else if (!strcmp(argv[2], "stall") && argc == 4) {
		stall(argv[3]);
	} else if (!strcmp(argv[2], "serve")) {
		negotiate();
		check_description();
		serve();
	} else {
		die("unknown mode %s", argv[2]);
	}
	return 0;
}
