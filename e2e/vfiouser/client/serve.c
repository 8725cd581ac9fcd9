// The client as the server of guest memory, for the requests that the server
// makes. It reads lines from stdin and answers each with one:
//
//	traffic       have the driver send and receive, from a reset on: "ok"
//	answer HOW    answer the server's next requests so: "ok"
//	release       send the reply that was held: "ok"
//	report        "reads R writes W changed C pages ADDRESS..."
//	hang-up       "ok", and the end
//
// It says "ready" when it has begun. HOW is one of: right; error, with EFAULT;
// error-writes, the same for writes only; short and long, by a byte; other, for
// another address; other-count; stranger, a reply to nobody before the right
// one; twice; never; and late, which holds a reply with damaged data.

#include "client.h"

enum { TABLE_AT = 0xfe000000, TABLE = 48, PAGE = 4096, LARGEST = 1 << 16 };

static char how[64] = "right";
static uint8_t table[TABLE];
static unsigned reads, writes, changed;
static bool marked[RAM / PAGE];

static uint8_t held[sizeof(struct header) + sizeof(struct dma_access) + LARGEST];
static size_t held_size;

// place finds guest memory. NULL: there is none.
static uint8_t *place(const struct dma_access *a) {
	if (a->address >= RAM_AT && a->count <= RAM && a->address - RAM_AT <= RAM - a->count) return ram + (a->address - RAM_AT);
	if (a->address >= TABLE_AT && a->count <= TABLE && a->address - TABLE_AT <= TABLE - a->count) return table + (a->address - TABLE_AT);
	return NULL;
}

static bool is(const char *answer) { return !strcmp(how, answer); }

// send_reply sends the header, which gets its size, and what follows.
static bool send_reply(struct header h, const void *body, size_t n) {
	static uint8_t b[sizeof held + 1];
	h.size = sizeof h + n;
	memcpy(b, &h, sizeof h);
	memcpy(b + sizeof h, body, n);
	if (is("never")) return true;
	if (is("late")) {
		memcpy(held, b, h.size);
		if (n > sizeof(struct dma_access)) held[h.size - 1] ^= 0xff;
		held_size = h.size;
		return true;
	}
	if (is("stranger")) {
		struct header s = h;
		s.id ^= 0x5a5;
		s.size = sizeof s;
		if (!send_raw(&s, sizeof s, NULL, 0)) return false;
	}
	return send_raw(b, h.size, NULL, 0) && (!is("twice") || send_raw(b, h.size, NULL, 0));
}

bool serve_request(const struct header *h) {
	static uint8_t body[sizeof(struct dma_access) + LARGEST + 1];
	struct dma_access a;
	size_t n = h->size - sizeof *h;
	if (h->size < sizeof *h + sizeof a || n > sizeof body - 1) die("a request of %u bytes", h->size);
	if (!recv_all(body, n)) return false;
	memcpy(&a, body, sizeof a);
	bool write = h->cmd == DMA_WRITE;
	if (!write && h->cmd != DMA_READ) die("the server sent command %u", h->cmd);
	if (a.count == 0 || a.count > LARGEST || n != sizeof a + (write ? a.count : 0)) die("command %u: %zu bytes for an access of %lu", h->cmd, n, a.count);
	uint8_t *at = place(&a);
	if (write) writes++;
	else reads++;
	struct header r = {h->id, h->cmd, 0, F_REPLY, 0};
	if (!at || is("error") || (write && is("error-writes"))) {
		r.flags |= F_ERROR;
		r.error = EFAULT;
		return send_reply(r, NULL, 0); // as QEMU does, also to a posted write
	}
	if (write) {
		changed += memcmp(at, body + sizeof a, a.count) != 0;
		memcpy(at, body + sizeof a, a.count);
		if (at >= ram && at < ram + RAM)
			for (uint64_t p = a.address / PAGE; p <= (a.address + a.count - 1) / PAGE; p++) marked[p - RAM_AT / PAGE] = true;
		if (h->flags & F_NO_REPLY) return true;
		n = sizeof a;
	} else {
		memcpy(body + sizeof a, at, a.count);
		n = sizeof a + a.count;
	}
	if (is("other")) a.address += PAGE;
	if (is("other-count")) a.count++;
	memcpy(body, &a, sizeof a);
	if (is("short")) n--;
	if (is("long")) n++;
	return send_reply(r, body, n);
}

static void report(void) {
	printf("reads %u writes %u changed %u pages", reads, writes, changed);
	for (int i = 0; i < RAM / PAGE; i++)
		if (marked[i]) printf(" %#x", RAM_AT + i * PAGE);
	printf("\n");
	reads = writes = changed = 0;
	memset(marked, 0, sizeof marked);
}

void serve(void) {
	for (int i = 0; i < TABLE; i++) table[i] = i + 1;
	wr(VFIO_PCI_CONFIG_REGION_INDEX, PCI_BASE_ADDRESS_3, 4, TABLE_AT);
	bring_up();
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	for (;;) {
		struct pollfd f[] = {{.fd = sock, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
		if (poll(f, 2, -1) < 0) die("poll: %m");
		if (f[0].revents) {
			struct header h;
			if (!recv_all(&h, sizeof h)) {
				puts("closed");
				return;
			}
			if ((h.flags & 0xf) == F_REPLY) die("a reply to nothing");
			if (!serve_request(&h)) die("the session ended within a request");
			continue;
		}
		if (!f[1].revents) continue;
		char line[64];
		ssize_t n = read(STDIN_FILENO, line, sizeof line - 1); // one line at a time is sent
		if (n <= 0) return;
		line[n] = 0;
		line[strcspn(line, "\n")] = 0;
		if (!strcmp(line, "report")) {
			report();
			continue;
		}
		if (!strcmp(line, "traffic")) {
			drive();
		} else if (!strncmp(line, "answer ", 7)) {
			snprintf(how, sizeof how, "%s", line + 7);
		} else if (!strcmp(line, "release")) {
			if (!held_size || !send_raw(held, held_size, NULL, 0)) die("there is no reply to release");
			held_size = 0;
		} else if (strcmp(line, "hang-up")) {
			die("unknown line %s", line);
		}
		puts("ok");
		if (!strcmp(line, "hang-up")) return;
	}
}
