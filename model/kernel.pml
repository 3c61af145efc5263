/*
 * The kernel's rules for UDP sockets that are bound to one source address, and
 * for sock_diag's lookup of a 4-tuple: net/ipv4/udp.c, net/ipv4/udp_diag.c.
 *
 * A call that takes a lock throughout, or that changes one value, is one step.
 * bind and the lookup are not: bind reads the flags of the sockets on the port
 * one by one before it adds its own, and the lookup walks along the same list
 * without a lock.
 */

#define NONE 255 /* no socket */
#define GONE 254 /* a socket that was closed after the lookup had chosen it */

byte port[S]; /* 0: not bound */
byte dest[S]; /* 0: not connected */
bool flag[S]; /* SO_REUSEADDR */

typedef Slot {
	byte count;
	byte on[S];        /* the sockets on the port, the one bound last first */
	byte locked = NONE /* by which socket's bind, the spin lock of the hash slot */
};
Slot slot[PORTS + 1];

/* Of the lookup that a process is in: */
byte at[S] = NONE;   /* the socket to look at next */
byte best[S] = NONE; /* the best match so far */
bool held[S];        /* the best match is the answer, its address is read next */
byte remote[S];      /* that address, if the socket has been closed before */

byte k; /* for loops inside of a step; 0 between steps */

inline after(s, result) {
	k = 0;
	do
	:: slot[port[s]].on[k] != s -> k++
	:: else -> break
	od;
	result = (k + 1 < slot[port[s]].count -> slot[port[s]].on[k + 1] : NONE);
	k = 0
}

/* Adds a socket to those on the port. */
inline insert(s, p) {
	k = slot[p].count;
	do
	:: k > 0 -> slot[p].on[k] = slot[p].on[k - 1]; k--
	:: else -> break
	od;
	slot[p].on[0] = s;
	slot[p].count++;
	port[s] = p
}

/* bind with the flag off: fails if anybody is on the port. */
inline bindAlone(s, p, ok) {
	flag[s] = false;
	ok = slot[p].count == 0;
	if
	:: ok -> insert(s, p)
	:: else
	fi
}

/* The port's lock is taken by whoever adds or removes a socket. */
#define unlocked(p) (slot[p].locked == NONE)

#define closable(s) (port[s] == 0 || unlocked(port[s]))

byte nextOne; /* 0 between steps */

/* close, by the process or by its end. Who was about to look at the socket goes
 * on to the next one; who has chosen it, but does not hold it, will not get it. */
inline close(s) {
	if
	:: port[s] != 0 ->
		after(s, nextOne);
		k = 0;
		do
		:: k < S ->
			if
			:: at[k] == s -> at[k] = nextOne
			:: else
			fi;
			if
			:: best[k] == s && held[k] -> remote[k] = dest[s]; best[k] = GONE
			:: best[k] == s && !held[k] -> best[k] = GONE
			:: else
			fi;
			k++
		:: else -> break
		od;
		k = 0;
		do
		:: slot[port[s]].on[k] != s -> k++
		:: else -> break
		od;
		do
		:: k + 1 < slot[port[s]].count -> slot[port[s]].on[k] = slot[port[s]].on[k + 1]; k++
		:: else -> break
		od;
		slot[port[s]].on[k] = 0;
		slot[port[s]].count--;
		k = 0;
		nextOne = 0
	:: else
	fi;
	port[s] = 0;
	dest[s] = 0;
	flag[s] = false
}

/* Begins a lookup by process s. */
inline beginLookup(s, p) {
	at[s] = (slot[p].count > 0 -> slot[p].on[0] : NONE);
	best[s] = NONE
}

/* Looks at one socket: one that is connected to the very 4-tuple before any
 * other, an unconnected one before none. Of several unconnected ones it is the
 * one bound last; of several on the 4-tuple the one bound last, or since Linux
 * 6.13 connected last, so here any. */
inline visit(s, d) {
	if
	:: dest[at[s]] == d -> best[s] = at[s]; at[s] = NONE
	:: dest[at[s]] == d -> best[s] = at[s]; after(at[s], at[s])
	:: else ->
		if
		:: dest[at[s]] == 0 && best[s] == NONE -> best[s] = at[s]
		:: else
		fi;
		after(at[s], at[s])
	fi
}

#define onTuple(s, p, d) (port[s] == p && dest[s] == d)
