volatile const __u32 groups_mask; // the length of groups, less one; set by the loader
volatile const __u64 seed;        // of the hash

// How many reservations with a source address there are for a port and a peer,
// whatever the source: for sockets whose source is not known yet. A hash table
// without locks and without deletion: each word has a tag in its upper bits and
// a number in the lower ones, and with number 0 it can have another tag. It may
// be within WINDOW words from where its hash says.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} groups SEC(".maps");

#define WINDOW 16
#define NUMBER (((__u64)1 << 24) - 1)

// hash leaves out the source.
static __always_inline __u64 hash(const struct tuple *t)
{
	__u64 h = seed;
	__u64 in[4] = {
		t->netns,
		(__u64)t->peer[0] << 32 | t->peer[1],
		(__u64)t->peer[2] << 32 | t->peer[3],
		(__u64)t->port << 32 | t->peer_port,
	};
#pragma unroll
	for (int i = 0; i < 4; i++) {
		h = (h ^ in[i]) * 0x9fb21c651e98df25;
		h ^= h >> 32;
	}
	return h;
}

static __always_inline __u64 *word(__u64 index)
{
	__u32 i = index & groups_mask;
	return bpf_map_lookup_elem(&groups, &i);
}

static __always_inline __u64 tag_of(__u64 hash)
{
	return (hash & ~NUMBER) | (__u64)1 << 63; // never 0, as an unused word is
}

// join counts t in its group, and says in which word.
__noinline int join(const struct tuple *t, __u32 *index)
{
	if (!t || !index)
		return -EINVAL;
	__u64 h = hash(t), tag = tag_of(h);

	for (__u64 i = 0; i < WINDOW; i++) {
		__u64 *w = word(h + i);
		if (!w || (*(volatile __u64 *)w & ~NUMBER) != tag)
			continue;
		// Meanwhile it may have become another group's.
		if ((__sync_fetch_and_add(w, 1) & ~NUMBER) == tag) {
			*index = (h + i) & groups_mask;
			return 0;
		}
		__sync_fetch_and_sub(w, 1);
	}
	for (__u64 i = 0; i < WINDOW; i++) {
		__u64 *w = word(h + i);
		if (!w)
			continue;
		__u64 old = *(volatile __u64 *)w;
		// Two sockets may come to have one word each for the same group.
		if (!(old & NUMBER) && __sync_val_compare_and_swap(w, old, tag | 1) == old) {
			*index = (h + i) & groups_mask;
			return 0;
		}
	}
	return -ENOMEM;
}

// has_members reports whether there are sockets in the group of t.
__noinline bool has_members(const struct tuple *t)
{
	if (!t)
		return true;
	__u64 h = hash(t), tag = tag_of(h);

	for (__u64 i = 0; i < WINDOW; i++) {
		__u64 *w = word(h + i);
		if (!w)
			continue;
		// Reading the first one by an addition is a full barrier.
		__u64 v = i ? *(volatile __u64 *)w : __sync_fetch_and_add(w, 0);
		if ((v & ~NUMBER) == tag && (v & NUMBER))
			return true;
	}
	return false;
}

// leave is the end of a membership. The word cannot have become another group's
// meanwhile.
static __always_inline void leave(__u32 index)
{
	__u64 *w = word(index);
	if (w)
		__sync_fetch_and_sub(w, 1);
}
