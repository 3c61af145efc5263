// A tuple has IPv4 addresses in their IPv4-mapped form, in network byte order, so
// that one socket of each family are seen to collide. A socket that is bound to
// no address has source 0 until the kernel's connect has given it one: it may
// become any.
//
// There is no network interface in it: that of a link-local destination is not
// told to a program. Two sockets that only differ in it are taken to collide.
struct tuple {
	__u64 netns;
	__u32 source[4];
	__u32 peer[4];
	__u32 port;
	__u32 peer_port;
};

static __always_inline bool is_zero(const __u32 a[4])
{
	return !(a[0] | a[1] | a[2] | a[3]);
}

static __always_inline bool is_mapped(const __u32 a[4])
{
	return !a[0] && !a[1] && a[2] == bpf_htonl(0xffff);
}

static __always_inline void set4(__u32 a[4], __u32 ipv4)
{
	a[0] = a[1] = 0;
	a[2] = bpf_htonl(0xffff);
	a[3] = ipv4;
}

// No address is written in one way.
static __always_inline void normalize(__u32 a[4])
{
	if (is_mapped(a) && !a[3])
		a[2] = 0;
}

static __always_inline bool same_source(const struct tuple *a, const struct tuple *b)
{
	return a->source[0] == b->source[0] && a->source[1] == b->source[1] &&
	       a->source[2] == b->source[2] && a->source[3] == b->source[3];
}

// same_rest is about all but the source.
static __always_inline bool same_rest(const struct tuple *a, const struct tuple *b)
{
	return a->netns == b->netns && a->port == b->port && a->peer_port == b->peer_port &&
	       a->peer[0] == b->peer[0] && a->peer[1] == b->peer[1] &&
	       a->peer[2] == b->peer[2] && a->peer[3] == b->peer[3];
}

static __always_inline bool same(const struct tuple *a, const struct tuple *b)
{
	return same_rest(a, b) && same_source(a, b);
}

// is_group tells destinations from which nothing ever comes: multicast and
// broadcast. Any number of sockets may be connected to one.
static __always_inline bool is_group(const __u32 a[4])
{
	if (is_mapped(a))
		return (a[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) || a[3] == 0xffffffff;
	return (a[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}
