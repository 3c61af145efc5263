/*
 * Who follows the protocol: take and takeShared in control_udp.go, and the
 * search for a port in search_udp_linux.go. A follower is one socket of some
 * process, or none. It dials, keeps the connection for as long as it likes, ends
 * or crashes, and dials again, so it stands for any number of processes one after
 * the other; a process with several sockets is several followers.
 */

mtype = { idle, nextPort, tryAlone, look, looking, reading, beginBind, binding,
	lock, await, lookAgain, connecting, unlock, connected, conflict, contention };

mtype pc[FOLLOWERS] = idle;
byte wants[FOLLOWERS]; /* the destination */
byte from[FOLLOWERS];  /* the port that is tried */
byte left[FOLLOWERS];  /* the set of ports not tried yet */
bool picks[FOLLOWERS]; /* it may have any port, else only this one */
bool early[FOLLOWERS]; /* looked before the first bind, as tryNext does */

/* What no follower knows, and the properties are about. */
bool met[FOLLOWERS];           /* somebody has been on the 4-tuple since the try began */
byte before[FOLLOWERS] = NONE; /* the neighbour that was there first */
byte solo = NONE;              /* who runs alone */
byte calling = NONE;           /* who is in a call that is one step */

#define mayRun(s) ((solo == NONE || solo == s) && (calling == NONE || calling == s))
#define calm(s)   (pc[s] == idle || pc[s] == connected)
#define all       ((1 << PORTS) - 1)

byte j;   /* for loops inside of a step; 0 between steps */
byte yes; /* 0 between steps */

inline begin(s, p) {
	from[s] = p;
	met[s] = false;
	before[s] = NONE;
	j = 0;
	do
	:: j < S -> met[s] = !picks[s] && (met[s] || onTuple(j, p, wants[s])); j++
	:: else -> break
	od;
	j = 0
}

inline forget(s) {
	pc[s] = idle; wants[s] = 0; from[s] = 0; left[s] = 0; picks[s] = false;
	early[s] = false; met[s] = false; before[s] = NONE; at[s] = NONE; best[s] = NONE;
	held[s] = false; remote[s] = 0;
	if
	:: solo == s && !TURNS -> solo = NONE
	:: else
	fi
}

/* Whoever is after this 4-tuple has met a socket that is on it now. */
inline tell(p, d) {
	j = 0;
	do
	:: j < FOLLOWERS -> met[j] = met[j] || (!picks[j] && from[j] == p && wants[j] == d); j++
	:: else -> break
	od;
	j = 0
}

/* Notes a neighbour that is on the port, unconnected. */
inline noteNeighbour(s) {
	j = FOLLOWERS;
	do
	:: j < S ->
		if
		:: port[j] == from[s] && dest[j] == 0 && flag[j] -> before[s] = j
		:: else
		fi;
		j++
	:: else -> break
	od;
	j = 0
}

/* Properties 1 and 4. */
inline check(s) {
	j = 0;
	do
	:: j < SHARERS -> assert(j == s || !onTuple(j, from[s], wants[s])); j++
	:: else -> break
	od;
	j = 0;
	assert(!FIRST_COME || before[s] == NONE)
}

#ifdef CRASHES
#define mayCrash(s) (pc[s] != idle && pc[s] != binding && solo == NONE && calling == NONE)
#else
#define mayCrash(s) false
#endif

/* A dial begins when nobody else is in one: it must not find the port locked. */
inline perhapsSolo(s) {
	#ifdef SOLO
	yes = true;
	j = 0;
	do
	:: j < FOLLOWERS -> yes = yes && (j == s || calm(j)); j++
	:: else -> break
	od;
	j = 0;
	if
	:: yes -> solo = s
	:: true
	fi;
	yes = 0
	#else
	skip
	#endif
}

/* With TURNS, from some moment on each runs alone for one try. */
inline pass(s) {
	solo = (TURNS && solo == s -> (s + 1) % FOLLOWERS : solo)
}

active [FOLLOWERS] proctype follower() {
	do
	:: atomic { pc[_pid] == idle && (solo == NONE || TURNS) && mayRun(_pid) ->
		perhapsSolo(_pid);
		CHOOSE(wants[_pid], _pid);
		if
		:: PORTS == 1 -> begin(_pid, 1); pc[_pid] = tryAlone
		:: PORTS > 1 -> picks[_pid] = true; left[_pid] = all; pc[_pid] = nextPort
		fi;
		printf("%d: dial destination %d\n", _pid, wants[_pid])
	}

	/* The next port of a search; at the end some that were locked are tried again. */
	:: atomic { pc[_pid] == nextPort && mayRun(_pid) ->
		early[_pid] = false;
		if
		:: left[_pid] & 1 -> left[_pid] = left[_pid] & ~1; begin(_pid, 1)
		:: left[_pid] & 2 -> left[_pid] = left[_pid] & ~2; begin(_pid, 2)
		:: left[_pid] == 0 -> printf("%d: ports exhausted\n", _pid); forget(_pid)
		fi;
		if
		:: pc[_pid] == nextPort -> pc[_pid] = tryAlone
		:: pc[_pid] == nextPort -> early[_pid] = true; pc[_pid] = look
		:: else
		fi
	}

	/* take */
	:: d_step { pc[_pid] == tryAlone && mayRun(_pid) && unlocked(from[_pid]) ->
		bindAlone(_pid, from[_pid], yes);
		if
		:: yes -> pc[_pid] = connecting; printf("%d: bind port %d, flag off: works\n", _pid, from[_pid])
		:: !yes && (early[_pid] || NO_FIRST_LOOKUP) -> pc[_pid] = beginBind
		:: else -> pc[_pid] = look
		fi;
		if
		:: !yes && !early[_pid] -> noteNeighbour(_pid)
		:: else
		fi;
		yes = 0
	}

	:: d_step { (pc[_pid] == look || pc[_pid] == lookAgain) && mayRun(_pid) ->
		if
		:: pc[_pid] == look -> noteNeighbour(_pid)
		:: else
		fi;
		calling = (ONE_STEP -> _pid : NONE);
		beginLookup(_pid, from[_pid]);
		pc[_pid] = looking
	}
	:: atomic { pc[_pid] == looking && at[_pid] != NONE && mayRun(_pid) -> visit(_pid, wants[_pid]) }
	:: d_step { pc[_pid] == looking && at[_pid] == NONE && mayRun(_pid) ->
		calling = (ONE_STEP && best[_pid] < S -> _pid : NONE);
		if
		:: best[_pid] < S -> held[_pid] = true; pc[_pid] = reading
		:: best[_pid] >= S && port[_pid] != 0 -> pc[_pid] = lookAgain
		:: best[_pid] == GONE && port[_pid] == 0 && TELLS_GONE -> pc[_pid] = look
		:: else ->
			printf("%d: lookup: nobody\n", _pid);
			best[_pid] = NONE;
			pc[_pid] = (early[_pid] -> tryAlone : beginBind)
		fi
	}
	:: d_step { pc[_pid] == reading && mayRun(_pid) ->
		calling = NONE;
		if
		:: best[_pid] != GONE -> remote[_pid] = dest[best[_pid]]
		:: else
		fi;
		printf("%d: lookup: finds %d, connected to %d\n", _pid, best[_pid], remote[_pid]);
		if
		:: best[_pid] == _pid || (port[_pid] != 0 && NO_COOKIE) -> pc[_pid] = (CONNECT_FIRST -> unlock : connecting)
		:: else -> pc[_pid] = (IS_CONFLICT(remote[_pid], wants[_pid]) -> conflict : contention)
		fi;
		held[_pid] = false; remote[_pid] = 0; best[_pid] = NONE
	}

	/* takeShared */
	:: d_step { pc[_pid] == beginBind && mayRun(_pid) && unlocked(from[_pid]) ->
		calling = (ONE_STEP -> _pid : NONE);
		flag[_pid] = true;
		slot[from[_pid]].locked = _pid;
		at[_pid] = (slot[from[_pid]].count > 0 -> slot[from[_pid]].on[0] : NONE);
		pc[_pid] = binding
	}
	:: d_step { pc[_pid] == binding && at[_pid] != NONE && mayRun(_pid) ->
		if
		:: flag[at[_pid]] ->
			printf("%d: bind port %d, flag on: %d has it on as well\n", _pid, from[_pid], at[_pid]);
			after(at[_pid], at[_pid])
		:: else ->
			printf("%d: bind port %d, flag on: EADDRINUSE, %d has the flag off\n", _pid, from[_pid], at[_pid]);
			at[_pid] = NONE; slot[from[_pid]].locked = NONE; calling = NONE;
			pc[_pid] = contention
		fi
	}
	:: d_step { pc[_pid] == binding && at[_pid] == NONE && mayRun(_pid) ->
		insert(_pid, from[_pid]);
		slot[from[_pid]].locked = NONE; calling = NONE;
		printf("%d: bind port %d, flag on: works\n", _pid, from[_pid]);
		pc[_pid] = lock
	}
	:: d_step { pc[_pid] == lock && mayRun(_pid) ->
		flag[_pid] = KEEP_FLAG;
		printf("%d: flag off\n", _pid);
		pc[_pid] = (NO_AWAIT -> (CONNECT_FIRST -> connecting : lookAgain) : await)
	}
	/* A bind that has read the flag before it was off is over when another bind,
	 * which is bound to fail, has had the lock of the hash slot. */
	:: d_step { pc[_pid] == await && mayRun(_pid) && unlocked(from[_pid]) ->
		pc[_pid] = (CONNECT_FIRST -> connecting : lookAgain)
	}

	/* finish */
	:: d_step { pc[_pid] == connecting && mayRun(_pid) ->
		printf("%d: connect from port %d to destination %d\n", _pid, from[_pid], wants[_pid]);
		check(_pid);
		dest[_pid] = wants[_pid];
		tell(from[_pid], wants[_pid]);
		pc[_pid] = (CONNECT_FIRST && !flag[_pid] -> lookAgain : unlock)
	}
	:: d_step { pc[_pid] == unlock && mayRun(_pid) ->
		flag[_pid] = !KEEP_LOCK;
		printf("%d: flag on, done\n", _pid);
		forget(_pid);
		pc[_pid] = connected
	}

	:: atomic { pc[_pid] == conflict && mayRun(_pid) && closable(_pid) ->
		close(_pid);
		if
		:: picks[_pid] -> pc[_pid] = nextPort
		:: else -> printf("%d: EADDRINUSE, the 4-tuple is in use\n", _pid); assert(met[_pid]); forget(_pid)
		fi
	}
	:: atomic { pc[_pid] == contention && mayRun(_pid) && closable(_pid) ->
		assert(TURNS || solo == NONE); /* property 2 */
		close(_pid);
		if
		:: picks[_pid] -> pc[_pid] = nextPort
		:: picks[_pid] && MAY_GIVE_UP -> left[_pid] = left[_pid] | (1 << (from[_pid] - 1)); pc[_pid] = nextPort
		:: !picks[_pid] -> printf("%d: once more\n", _pid); begin(_pid, from[_pid]); pc[_pid] = tryAlone; pass(_pid)
		:: !picks[_pid] && MAY_GIVE_UP -> printf("%d: EADDRINUSE, the port is held\n", _pid); forget(_pid)
		fi
	}

	:: d_step { pc[_pid] == connected && solo == NONE && mayRun(_pid) && closable(_pid) && MAY_CLOSE ->
		close(_pid); forget(_pid); printf("%d: close\n", _pid)
	}
	:: d_step { mayCrash(_pid) && mayRun(_pid) && closable(_pid) ->
		close(_pid); forget(_pid); printf("%d: crash\n", _pid)
	}
	od
}

#if TURNS
#define blocked(s) (pc[s] == connected || (pc[s] == contention && !closable(s)) || \
	((pc[s] == tryAlone || pc[s] == beginBind || pc[s] == await) && !unlocked(from[s])))

active proctype referee() {
	solo = 0;
	do
	:: d_step { blocked(solo) -> solo = (solo + 1) % FOLLOWERS }
	od
}
#endif
