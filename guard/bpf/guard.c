// The programs of a guard: no two UDP sockets are ever connected to the same
// 4-tuple.
//
// connect4 and connect6 run before the kernel's own connect, and reserve the
// 4-tuple that the socket is going to have. Of two sockets that want one 4-tuple,
// on whatever processors, one gets it: of two insertions of a key into a hash map
// with BPF_NOEXIST, one fails.
//
// Nothing runs after the kernel's connect, nor at a connect to AF_UNSPEC. So what
// has become of a connect is found out later: when the socket connects again, or
// by sync, which goes through all sockets. A reservation is given up only where it
// is certain that the socket has left the 4-tuple, and that no thread is about to
// place it there. released gives up the rest at close.

#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "tuple.h"
#include "groups.h"
#include "kernel.h"

char _license[] SEC("license") = "Dual MIT/GPL";

enum { AF_INET = 2, AF_INET6 = 10, SOL_SOCKET = 1, SO_REUSEADDR = 2, SO_REUSEPORT = 15 };
enum { SOCK_DGRAM = 2, SOCK_BINDPORT_LOCK = 8 };
enum { ESTABLISHED = 1 }; // include/net/tcp_states.h; a connected UDP socket is in it

// What the loader sets.
volatile const bool fail_open;  // a connect is let through when a map is full
volatile const bool share;      // sockets without a port get one that they share
volatile const __u64 cgroup_id; // whose sockets sync goes through
volatile bool adopting;         // sync is to find those that were there before

// A claim is a reservation that a socket holds.
struct claim {
	struct tuple tuple;

	// The connect that may be about to place the socket there: the thread in
	// the lower half, the holder's count of connects in the upper one. 0 if
	// none is, MANY if more have tried than there are claims for.
	__u64 by;

	__u32 held; // UNUSED, AWAY, THERE, ANOTHER or WAITING
	__u32 word; // of groups, in which it is counted, else NO_WORD
};

#define MANY (~(__u64)0)
#define NO_WORD (~(__u32)0)

// Where the socket was when the connect began: AWAY, so that the connect is over if
// the socket is found on the 4-tuple, or THERE, already or perhaps because of another
// connect. ANOTHER thread is connecting it to the 4-tuple of a claim that there is,
// which is kept for as long. Or it is not connected, and WAITING on a port that it
// shares.
enum { UNUSED, AWAY, THERE, ANOTHER, WAITING };

#define CLAIMS 4

// What a socket holds: the 4-tuple where it is, and those where a connect may be
// about to place it.
struct holder {
	// The socket's cookie, shifted, with LOCKED and CLOSED. The kernel runs the
	// hooks of a socket one at a time, but not released, nor sync before Linux
	// 6.5. Both may come late, when the memory is another socket's: so they
	// write only under the lock, and lock only what has their own cookie.
	__u64 owner;
	__u32 connects;
	__u32 unreserved; // it is connected without a reservation, and counted
	struct claim claims[CLAIMS];
};

// A doubt is a connect of which sync does not know whether it is over.
struct doubt {
	__u64 cookie;
	__u64 by;
};

// The 4-tuples that are reserved, with the cookie of the socket. The loader sets
// the size.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct tuple);
	__type(value, __u64);
} reserved SEC(".maps");

// By cookie. Storage of the socket itself takes five times as long.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct holder);
} holders SEC(".maps");

// Sockets that were closed while sync was to find those that were there before.
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} closing SEC(".maps");

// Connects (claim.by) that are over, as the loader has found out, by cookie.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct doubt);
	__type(value, __u8);
} over SEC(".maps");

enum counter { ALLOWED, DENIED, FAILED_OPEN, OVERLAPPING, COUNTERS };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, enum counter);
	__type(value, __u64);
} counters SEC(".maps");

// The ephemeral port range, by network namespace, with the reserved ports as a bit
// each.
struct ports {
	__u32 low, count;
	__u32 crowded; // there are hardly any that nobody is on
	__u32 pad;
	__u64 reserved[1024];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u64);
	__type(value, struct ports);
} ports SEC(".maps");

// The ports that UDP sockets are on, as sync finds them, by network namespace, a
// bit each.
struct port_set {
	__u64 ports[1024];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u64);
	__type(value, struct port_set);
} taken SEC(".maps");

// The last connect that was denied.
struct denial {
	struct tuple tuple;
	__u64 ns; // since boot
	__u32 pid;
	char comm[16];
	__u32 errno;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct denial);
} denials SEC(".maps");

// The verifier goes through a function that is not static only once. Some are
// for their stack: with all that call them, functions have 512 bytes.

static __always_inline void count(enum counter what)
{
	__u64 *n = bpf_map_lookup_elem(&counters, &what);
	if (n)
		__sync_fetch_and_add(n, 1); // a preempted program shares the processor
}

__noinline int drop(struct claim *c)
{
	if (!c)
		return 0;
	struct tuple key = c->tuple; // Linux 6.1 takes no key that was passed to a function
	if (c->held != ANOTHER) {
		if (c->word != NO_WORD)
			leave(c->word);
		bpf_map_delete_elem(&reserved, &key);
	}
	c->held = UNUSED;
	return 0;
}

// reserve makes an unused claim one of t, and returns 0, -EEXIST or the error of
// a full map.
__noinline int reserve(struct claim *c, const struct tuple *t, __u64 cookie, __u64 by)
{
	if (!c || !t)
		return -EINVAL;
	struct tuple key = *t;
	int err = bpf_map_update_elem(&reserved, &key, &cookie, BPF_NOEXIST);
	if (err)
		return err;
	c->tuple = *t;
	c->by = by;
	c->word = NO_WORD;
	c->held = AWAY;
	if (is_zero(t->source))
		return 0;
	err = join(t, &c->word);
	if (err) {
		bpf_map_delete_elem(&reserved, &key);
		c->held = UNUSED;
	}
	return err;
}

// collides_unknown is about sockets whose source is not known yet: from one that
// a connect is giving a source right now, no 4-tuple with its port and its peer
// is safe, and the other way round.
//
// Of two sockets that come at the same time, one of either kind, at least one
// sees the other. The one has first joined its group and then looks for the
// other's reservation; the other has first made the reservation and then looks
// into the group. Between the two each of them does something atomic that returns
// a value, which is a full barrier: so they cannot both come too early.
__noinline bool collides_unknown(const struct tuple *t, __u64 cookie)
{
	if (!t)
		return true;
	if (is_zero(t->source))
		return has_members(t);
	struct tuple unknown = *t;
	unknown.source[0] = unknown.source[1] = unknown.source[2] = unknown.source[3] = 0;
	__u64 *other = bpf_map_lookup_elem(&reserved, &unknown);
	return other && *other != cookie;
}

enum { NOBODY, UNCONNECTED, CONNECTED };

// receiver asks the kernel who gets what the peer sends: a connected socket before
// others. Those that are bound to an interface are not found; nor are those that
// are bound to an address if t has none.
static __always_inline int receiver(struct bpf_sock_addr *ctx, const struct tuple *t)
{
	struct bpf_sock_tuple k = {};
	struct bpf_sock *sk;
	__u32 size;

	if (is_mapped(t->peer)) {
		k.ipv4.saddr = t->peer[3];
		k.ipv4.daddr = t->source[3];
		k.ipv4.sport = bpf_htons(t->peer_port);
		k.ipv4.dport = bpf_htons(t->port);
		size = sizeof(k.ipv4);
	} else {
		__builtin_memcpy(k.ipv6.saddr, t->peer, sizeof(t->peer));
		__builtin_memcpy(k.ipv6.daddr, t->source, sizeof(t->source));
		k.ipv6.sport = bpf_htons(t->peer_port);
		k.ipv6.dport = bpf_htons(t->port);
		size = sizeof(k.ipv6);
	}
	sk = bpf_sk_lookup_udp(ctx, &k, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return NOBODY;
	// A connected one is not found for another peer; but port 0 stands for all.
	bool found = sk->state == ESTABLISHED && sk->dst_port == bpf_htons(t->peer_port);
	bpf_sk_release(sk);
	return found ? CONNECTED : UNCONNECTED;
}

// collides_unreserved is about connected sockets that have no reservation: they
// are in another cgroup, have connected before the guard came, or did when a map
// was full. The socket that is connecting, and is at now, may be one itself.
static __always_inline bool collides_unreserved(struct bpf_sock_addr *ctx, const struct tuple *now,
						const struct tuple *t)
{
	return !is_zero(t->source) && !same(now, t) && receiver(ctx, t) == CONNECTED;
}

// NOWHERE is the peer's port of a socket that is not connected.
#define NOWHERE (~(__u32)0)

// became reports whether t is what a connect to the 4-tuple of c becomes: the same,
// or the kernel has chosen the source.
static __always_inline bool became(const struct claim *c, const struct tuple *t)
{
	return same_rest(&c->tuple, t) && (same_source(&c->tuple, t) || is_zero(c->tuple.source));
}

// is_mixed_up reports whether connects to both may end in the same place.
static __always_inline bool is_mixed_up(const struct claim *c, const struct tuple *t)
{
	return became(c, t) || (same_rest(&c->tuple, t) && is_zero(t->source));
}

// choose finds the claim for t: the one that the socket has of it already, or an
// unused one, or none.
static __always_inline struct claim *choose(struct holder *h, const struct tuple *t)
{
	struct claim *unused = 0;

	for (int i = 0; i < CLAIMS; i++) {
		struct claim *c = &h->claims[i];
		if (!c->held)
			unused = c;
		else if (c->held != ANOTHER && same(&c->tuple, t))
			return c;
	}
	return unused;
}

// is_needed reports whether the socket, which is at now, needs a claim.
__noinline bool is_needed(const struct holder *h, const struct claim *c, const struct tuple *now)
{
	if (!h || !c || !now)
		return true;
	if (c->held == WAITING)
		return now->peer_port == NOWHERE && now->port == c->tuple.port;
	if (c->by)
		return true;
	if (c->held == ANOTHER)
		return false;
	for (int i = 0; i < CLAIMS; i++) {
		const struct claim *other = &h->claims[i];
		if (other->held == ANOTHER && other->by && same(&other->tuple, &c->tuple))
			return true;
	}
	return same(&c->tuple, now);
}

// settle makes the claims those that the socket needs, which is at now. The
// caller has locked the holder.
__noinline int settle(struct holder *h, const struct tuple *now, __u64 cookie)
{
	struct claim *c;
	bool reserved_now = true;
	int err = 0;

	if (!h || !now)
		return 0;

	if (now->peer_port != NOWHERE) {
		// It has come here before the guard did, or with a source or a
		// port that was not known.
		c = choose(h, now);
		if (!c)
			err = -ENOMEM;
		else if (!c->held)
			err = reserve(c, now, cookie, 0);
		reserved_now = !err;
	}
	for (int i = 0; i < CLAIMS; i++) {
		c = &h->claims[i];
		// If it has come there since, the connect is over.
		if (c->held == AWAY && became(c, now))
			c->by = 0;
		// Somebody else may have the 4-tuple for the moment that it takes
		// to see that he must not have it: because of the reservation
		// without a source, which is kept for as long.
		if (c->held && !is_needed(h, c, now) && !(err && became(c, now)))
			drop(c);
		else if (c->held && became(c, now))
			reserved_now = true;
	}
	if (!reserved_now && !h->unreserved)
		count(err == -EEXIST ? OVERLAPPING : FAILED_OPEN);
	h->unreserved = !reserved_now;
	return 0;
}

static const struct holder nobody;

#define LOCKED 1
#define CLOSED 2
#define OWNER(cookie) ((cookie) << 2)

// find_or_make returns what a socket holds. Most connect once, and have nothing yet.
static __always_inline struct holder *find_or_make(__u64 cookie)
{
	bool made = !bpf_map_update_elem(&holders, &cookie, &nobody, BPF_NOEXIST);
	struct holder *h = bpf_map_lookup_elem(&holders, &cookie);
	if (h && made) // until it has an owner nobody deletes it
		__sync_val_compare_and_swap(&h->owner, 0, OWNER(cookie));
	return h;
}

__noinline bool lock(struct holder *h, __u64 cookie)
{
	if (!h)
		return false;
	for (int i = 0; i < 100; i++)
		if (__sync_val_compare_and_swap(&h->owner, OWNER(cookie), OWNER(cookie) | LOCKED) == OWNER(cookie))
			return true;
	return false; // whoever has it has lost the processor
}

// unlock returns false if the socket has been closed meanwhile. It stays locked, to
// be given up.
static __always_inline bool unlock(struct holder *h, __u64 cookie)
{
	__u64 locked = OWNER(cookie) | LOCKED;
	return __sync_val_compare_and_swap(&h->owner, locked, OWNER(cookie)) == locked;
}

// next_connect is what claims of this connect have in by.
static __always_inline __u64 next_connect(struct holder *h)
{
	return (__u64)(++h->connects & 0x7fffffff) << 32 | (__u32)bpf_get_current_pid_tgid();
}

// place has the 4-tuple that the socket has now, as a cgroup program sees it.
static __always_inline void place(struct bpf_sock *sk, __u64 netns, struct tuple *t)
{
	t->netns = netns;
	t->port = sk->src_port;
	if (sk->family == AF_INET) {
		set4(t->source, sk->src_ip4);
		set4(t->peer, sk->dst_ip4);
	} else {
		t->source[0] = sk->src_ip6[0];
		t->source[1] = sk->src_ip6[1];
		t->source[2] = sk->src_ip6[2];
		t->source[3] = sk->src_ip6[3];
		t->peer[0] = sk->dst_ip6[0];
		t->peer[1] = sk->dst_ip6[1];
		t->peer[2] = sk->dst_ip6[2];
		t->peer[3] = sk->dst_ip6[3];
	}
	normalize(t->source);
	t->peer_port = bpf_ntohs(sk->dst_port);
	if (sk->state != ESTABLISHED || is_group(t->peer))
		t->peer_port = NOWHERE;
}

// this_host sets the peer to what the kernel connects to when told the
// unspecified address (ip_route_output_key_hash_rcu, __ip6_datagram_connect).
static __always_inline void this_host(struct tuple *t, bool ipv4)
{
	bool source4 = is_mapped(t->source);
	if (ipv4 && source4)
		set4(t->peer, t->source[3]);
	else if (ipv4 || source4)
		set4(t->peer, bpf_htonl(INADDR_LOOPBACK));
	else
		t->peer[3] = bpf_htonl(1);
}

__noinline int deny(const struct tuple *t, int errno)
{
	if (!t)
		return 0;
	__u32 zero = 0;
	struct denial d = {.ns = bpf_ktime_get_boot_ns(), .pid = bpf_get_current_pid_tgid() >> 32, .errno = errno};

	d.tuple = *t;
	bpf_get_current_comm(d.comm, sizeof(d.comm));
	bpf_map_update_elem(&denials, &zero, &d, BPF_ANY);
	count(DENIED);
	bpf_set_retval(-errno);
	return 0;
}

static __always_inline int full(const struct tuple *t)
{
	if (!fail_open)
		return deny(t, ENOBUFS);
	count(FAILED_OPEN);
	return 1;
}

// take is guard for a socket whose holder is locked, and returns 0 or an errno.
//
// The kernel runs the hook while it has the socket locked, unlocks it, and locks
// it again to connect. In between another thread may come here with the same
// socket. So what this thread has claimed before and not got is given up, since
// the thread is here and not there; what another one has claimed is kept.
static __always_inline int take(struct bpf_sock_addr *ctx, struct holder *h, __u64 cookie,
				const struct tuple *now, const struct tuple *t)
{
	__u64 by = next_connect(h);
	struct claim *c, *another = 0;
	bool there = same(now, t);
	int err;

	for (int i = 0; i < CLAIMS; i++) {
		c = &h->claims[i];
		if ((__u32)c->by == (__u32)by)
			c->by = 0;
	}
	settle(h, now, cookie);
	// Where the socket is found then does not tell which of them is over.
	for (int i = 0; i < CLAIMS; i++) {
		c = &h->claims[i];
		if (!c->held) {
			another = c;
		} else if (c->by && is_mixed_up(c, t)) {
			if (c->held == AWAY)
				c->held = THERE;
			there = true;
		}
	}
	c = choose(h, t);
	if (!c)
		return EALREADY;
	if (c->held && c->by && another) {
		another->tuple = *t;
		another->by = by;
		another->held = ANOTHER;
		return 0;
	}
	if (c->held) {
		c->by = c->by ? MANY : by;
		c->held = there ? THERE : AWAY;
		return 0;
	}
	err = reserve(c, t, cookie, by);
	if (!err && there)
		c->held = THERE;
	if (err != -EEXIST && (collides_unknown(t, cookie) || collides_unreserved(ctx, now, t))) {
		if (!err)
			drop(c);
		return EEXIST;
	}
	h->unreserved = err && err != -EEXIST;
	return -err;
}

// A search is for a port from which the 4-tuple is free.
struct search {
	struct bpf_sock_addr *ctx;
	struct claim *claim; // an unused one
	struct ports *ports;
	struct tuple tuple;
	__u64 cookie, by;
	__u64 start, step;
	__u32 family;
	int err;
};

static __always_inline int bind(struct search *s)
{
	const __u32 *a = s->tuple.source;

	if (s->family == AF_INET) {
		struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = bpf_htons(s->tuple.port)};
		sa.sin_addr.s_addr = a[3]; // the mapped form, or zero
		return bpf_bind(s->ctx, (struct sockaddr *)&sa, sizeof(sa));
	}
	struct sockaddr_in6 sa = {.sin6_family = AF_INET6, .sin6_port = bpf_htons(s->tuple.port)};
	sa.sin6_addr.s6_addr32[0] = a[0];
	sa.sin6_addr.s6_addr32[1] = a[1];
	sa.sin6_addr.s6_addr32[2] = a[2];
	sa.sin6_addr.s6_addr32[3] = a[3];
	return bpf_bind(s->ctx, (struct sockaddr *)&sa, sizeof(sa));
}

// Ports with an even offset in the range come first, as the kernel does it for TCP:
// programs that need a port of their own then still find one. Where PROBES of them
// in a row are taken most are, and the odd ones are no longer spared; to look at
// every even one takes a hundred times as long. Where as many odd ones are taken,
// all ports are tried, in steps that differ from search to search: prime numbers
// above all counts, so that none is left out.
#define PROBES 16

const __u32 steps[] = {1000003, 2246822519, 2654435761, 3266489917};

// tries is how many ports to try, all of them at least once.
static __always_inline __u32 tries(const struct ports *p)
{
	return p->count <= 2 * PROBES ? p->count : 2 * PROBES + p->count;
}

// nth is the offset of the port to try as the ith.
static __always_inline __u32 nth(const struct search *s, __u32 i)
{
	__u32 count = s->ports->count, even = (count + 1) / 2, odd = count / 2;
	__u32 probes = even < PROBES ? even : PROBES;

	if (i < probes)
		return (s->start + i) % even * 2;
	i -= probes;
	probes = odd < PROBES ? odd : PROBES;
	if (i < probes)
		return (s->start + i) % odd * 2 + 1;
	i -= probes;
	return (s->start + i * s->step) % count;
}

// try tries the ith port. It returns 1 when the search is over.
static long try(__u32 i, struct search *s)
{
	__u32 port = s->ports->low + nth(s, i);

	if (port > 0xffff) // the loader is just changing the range
		return 0;
	if (s->ports->reserved[port / 64 & 1023] & (__u64)1 << port % 64)
		return 0;
	s->tuple.port = port;
	s->err = -EEXIST;
	// To look first is faster than to make a reservation in vain.
	if (i && (bpf_map_lookup_elem(&reserved, &s->tuple) || collides_unknown(&s->tuple, s->cookie)))
		return 0;
	s->err = reserve(s->claim, &s->tuple, s->cookie, s->by);
	if (s->err == -EEXIST)
		return 0;
	if (s->err)
		return 1;
	// The port is reserved before it is bound: whoever comes to be on it as
	// well has to get past that. From an unconnected socket that shares the
	// port nothing is taken away.
	if (!collides_unknown(&s->tuple, s->cookie) && receiver(s->ctx, &s->tuple) == NOBODY && !bind(s))
		return 1;
	drop(s->claim);
	s->err = -EEXIST;
	return 0;
}

// share_port gives a socket that has no port one that it shares, from which the
// 4-tuple is free. It returns whether there was one.
static __always_inline bool share_port(struct bpf_sock_addr *ctx, const struct tuple *t, struct holder *h,
				       __u64 cookie)
{
	struct search s = {
		.ctx = ctx,
		.ports = bpf_map_lookup_elem(&ports, &t->netns),
		.tuple = *t,
		.cookie = cookie,
		.start = bpf_get_prandom_u32(),
		.step = steps[bpf_get_prandom_u32() % (sizeof(steps) / sizeof(steps[0]))],
		.family = ctx->sk->family,
		.err = -EEXIST,
	};
	int on = 1;

	s.claim = choose(h, t);
	if (!s.ports || !s.claim || s.claim->held || is_group(t->peer))
		return false;
	s.by = next_connect(h);
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)))
		return false;
	bpf_loop(tries(s.ports), try, &s, 0);
	return !s.err;
}

// NO_PEER is the peer's port in the reservation of a socket that is WAITING.
#define NO_PEER ((__u32)1 << 16)

// try_waiting is try for a socket that is about to be bound, and not connected.
static long try_waiting(__u32 i, struct search *s)
{
	__u32 port = s->ports->low + (s->start + i) % s->ports->count;
	struct tuple t = {};

	if (port > 0xffff)
		return 0;
	if (s->ports->reserved[port / 64 & 1023] & (__u64)1 << port % 64)
		return 0;
	t.netns = s->tuple.netns;
	t.port = port;
	t.peer_port = NO_PEER;
	s->err = reserve(s->claim, &t, s->cookie, 0);
	if (s->err == -EEXIST)
		return 0;
	if (s->err)
		return 1;
	s->claim->held = WAITING;
	s->tuple.port = port;
	if (receiver(s->ctx, &s->tuple) == NOBODY)
		return 1;
	drop(s->claim);
	s->err = -EEXIST;
	return 0;
}

// share_bound lets a socket that binds port 0 have a port that others are connected
// from: the kernel would look for one that nobody is on, and it is said that there
// are none. No other such socket is on it, and nobody who is not connected. Where
// the socket will connect to is not known; that may then be denied.
static __always_inline int share_bound(struct bpf_sock_addr *ctx, const __u32 source[4], bool ipv4)
{
	struct search s = {.start = bpf_get_prandom_u32(), .ctx = ctx, .err = -EEXIST};
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct holder *h;
	int on = 1;

	if (!share || !ctx->sk || ctx->type != SOCK_DGRAM || ctx->protocol != IPPROTO_UDP || ctx->user_port ||
	    is_group(source))
		return 1;
	s.cookie = bpf_get_socket_cookie(ctx);
	s.ports = bpf_map_lookup_elem(&ports, &netns);
	if (!s.ports || !s.ports->crowded)
		return 1;
	s.tuple.netns = netns;
	s.tuple.source[0] = source[0];
	s.tuple.source[1] = source[1];
	s.tuple.source[2] = source[2];
	s.tuple.source[3] = source[3];
	if (ipv4)
		set4(s.tuple.peer, 0);
	h = find_or_make(s.cookie);
	if (!h || !lock(h, s.cookie))
		return 1;
	s.claim = choose(h, &s.tuple);
	if (s.claim && !s.claim->held)
		bpf_loop(s.ports->count, try_waiting, &s, 0);
	unlock(h, s.cookie);
	if (!s.err && !bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)))
		ctx->user_port = bpf_htons(s.tuple.port);
	return 1;
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	__u32 source[4];
	set4(source, ctx->user_ip4);
	return share_bound(ctx, source, true);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	__u32 source[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
	return share_bound(ctx, source, is_mapped(source));
}

static __always_inline int guard(struct bpf_sock_addr *ctx, const __u32 peer[4], bool ipv4)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple now = {}, t;
	struct holder *h;
	__u64 cookie;
	int err, off = 0;

	if (!sk || ctx->type != SOCK_DGRAM || ctx->protocol != IPPROTO_UDP)
		return 1;
	place(sk, bpf_get_netns_cookie(ctx), &now);
	t = now;
	t.peer[0] = peer[0];
	t.peer[1] = peer[1];
	t.peer[2] = peer[2];
	t.peer[3] = peer[3];
	t.peer_port = bpf_ntohs(ctx->user_port);
	normalize(t.peer);
	if (is_zero(t.peer))
		this_host(&t, ipv4);
	cookie = bpf_get_socket_cookie(ctx);
	if (!t.port && share) {
		h = find_or_make(cookie);
		if (h && lock(h, cookie)) {
			bool found = share_port(ctx, &t, h, cookie);
			unlock(h, cookie);
			if (found) {
				count(ALLOWED);
				return 1;
			}
		}
	}
	if (!t.port) {
		// The kernel picks a port that nobody is on, unless the socket is
		// one that shares.
		bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEADDR, &off, sizeof(off));
		bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEPORT, &off, sizeof(off));
	}
	if (!t.port || is_group(t.peer)) {
		count(ALLOWED);
		return 1;
	}
	h = find_or_make(cookie);
	if (!h) // what others have can still be seen
		return bpf_map_lookup_elem(&reserved, &t) || collides_unknown(&t, cookie) || collides_unreserved(ctx, &now, &t) ?
			       deny(&t, EADDRINUSE) :
			       full(&t);
	if (!lock(h, cookie))
		return deny(&t, EALREADY);
	err = take(ctx, h, cookie, &now, &t);
	unlock(h, cookie);
	switch (err) {
	case 0:
		count(ALLOWED);
		return 1;
	case EEXIST:
		return deny(&t, EADDRINUSE);
	case EALREADY:
		return deny(&t, EALREADY);
	default:
		return full(&t);
	}
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	__u32 peer[4];
	set4(peer, ctx->user_ip4);
	return guard(ctx, peer, true);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	__u32 peer[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};
	return guard(ctx, peer, is_mapped(peer));
}

// give_up ends what a socket holds. The caller has it locked.
static __always_inline void give_up(struct holder *h, __u64 cookie)
{
	for (int i = 0; i < CLAIMS; i++)
		if (h->claims[i].held)
			drop(&h->claims[i]);
	h->owner = 0;
	bpf_map_delete_elem(&holders, &cookie);
}

// released runs at the last close of a socket, however its process ends: nobody
// is connecting it any more.
SEC("cgroup/sock_release")
int released(struct bpf_sock *ctx)
{
	if (ctx->type != SOCK_DGRAM || ctx->protocol != IPPROTO_UDP)
		return 1;
	if (adopting) {
		__u32 *c = bpf_sk_storage_get(&closing, ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (c)
			__sync_lock_test_and_set(c, 1); // sync sees it, if its holder is not seen here
	}
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct holder *h = bpf_map_lookup_elem(&holders, &cookie);
	if (!h)
		return 1;
	for (int i = 0; i < 100; i++) {
		__u64 owner = OWNER(cookie);
		if (__sync_val_compare_and_swap(&h->owner, owner, owner | LOCKED) == owner) {
			give_up(h, cookie);
			break;
		}
		// Or it is left to sync, which has it locked.
		owner |= LOCKED;
		if (__sync_val_compare_and_swap(&h->owner, owner, owner | CLOSED) == owner)
			break;
	}
	return 1;
}

// place_of is place as a tracing program sees it.
static __always_inline void place_of(struct sock *sk, struct tuple *t)
{
	struct sock_common *c = &sk->__sk_common;

	t->netns = c->skc_net.net->net_cookie;
	t->port = c->skc_num;
	if (c->skc_family == AF_INET) {
		set4(t->source, c->skc_rcv_saddr);
		set4(t->peer, c->skc_daddr);
	} else {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			t->source[i] = c->skc_v6_rcv_saddr.in6_u.u6_addr32[i];
			t->peer[i] = c->skc_v6_daddr.in6_u.u6_addr32[i];
		}
	}
	t->peer_port = bpf_ntohs(c->skc_dport);
	if (c->skc_state != ESTABLISHED || is_group(t->peer))
		t->peer_port = NOWHERE;
}

#define MAX_LEVEL 64

// in_cgroup reports whether a socket belongs to the guard's cgroup, or to one
// below.
static __always_inline bool in_cgroup(struct sock *sk)
{
	struct cgroup *of = sk->sk_cgrp_data.cgroup, *ancestor;

	for (int level = 0; of && level <= of->level && level < MAX_LEVEL; level++) {
		void **ancestors = (void *)of + bpf_core_field_offset(of->ancestors);
		if (bpf_probe_read_kernel(&ancestor, sizeof(ancestor), &ancestors[level]))
			return false;
		if (BPF_CORE_READ(ancestor, kn, id) == cgroup_id)
			return true;
	}
	return false;
}

// shares tells a socket that others may share the port with. Any other one that
// has its port from the kernel is alone there.
static __always_inline bool shares(struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD_PROBED(&sk->__sk_common, skc_reuse) ||
	       BPF_CORE_READ_BITFIELD_PROBED(&sk->__sk_common, skc_reuseport) ||
	       BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks) & SOCK_BINDPORT_LOCK;
}

static __always_inline void note_port(__u64 netns, __u16 port)
{
	struct port_set *t = bpf_map_lookup_elem(&taken, &netns);

	if (t)
		__sync_fetch_and_or(&t->ports[port / 64], (__u64)1 << port % 64);
}

// sync goes through the sockets of a network namespace, makes up for what was not
// seen when it happened, and writes down in what it has doubts.
SEC("iter/udp")
int sync(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (struct sock *)ctx->udp_sk;
	struct tuple now = {};
	struct holder *h;
	struct doubt d = {};
	struct claim *c;
	bool adopt, closed;

	if (!sk || sk->sk_protocol != IPPROTO_UDP)
		return 0;
	if (share)
		note_port(sk->__sk_common.skc_net.net->net_cookie, sk->__sk_common.skc_num);
	if (!in_cgroup(sk))
		return 0;
	d.cookie = bpf_get_socket_cookie(sk);
	place_of(sk, &now);
	adopt = adopting && now.peer_port != NOWHERE && shares(sk);
	h = adopt ? find_or_make(d.cookie) : bpf_map_lookup_elem(&holders, &d.cookie);
	if (!h && adopt)
		count(FAILED_OPEN);
	if (!h || !lock(h, d.cookie))
		return 0;
	place_of(sk, &now); // before Linux 6.5 it may have moved
	for (int i = 0; i < CLAIMS; i++) {
		c = &h->claims[i];
		d.by = c->by;
		if (d.by && bpf_map_lookup_elem(&over, &d))
			c->by = 0;
	}
	settle(h, &now, d.cookie);
	for (int i = 0; i < CLAIMS; i++) {
		c = &h->claims[i];
		d.by = c->by;
		if (c->held && d.by && d.by != MANY)
			bpf_seq_write(ctx->meta->seq, &d, sizeof(d));
	}
	closed = adopt && bpf_sk_storage_get(&closing, sk, 0, 0);
	if (closed || !unlock(h, d.cookie))
		give_up(h, d.cookie);
	return 0;
}
