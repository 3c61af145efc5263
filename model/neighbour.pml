/* Who does not follow the protocol. None of them asks anybody. */

#ifdef PLAIN
/* A program that never sets the flag: whatever port it gets is its own. */
active [NEIGHBOURS] proctype plain() {
	do
	:: d_step { port[_pid] == 0 && unlocked(PLAIN) ->
		bindAlone(_pid, PLAIN, yes);
		printf("%d: plain bind of port %d: %d\n", _pid, PLAIN, yes);
		yes = 0
	}
	:: atomic { port[_pid] != 0 && dest[_pid] == 0 ->
		CHOOSE(dest[_pid], _pid);
		tell(port[_pid], dest[_pid]);
		printf("%d: plain connect to %d\n", _pid, dest[_pid])
	}
	:: d_step { port[_pid] != 0 && closable(_pid) -> close(_pid); printf("%d: plain close\n", _pid) }
	od
}
#endif

#ifdef OUTSIDER
/* Whoever found it on the port owes it nothing any more. */
inline noLongerFirst(s) {
	j = 0;
	do
	:: j < FOLLOWERS ->
		before[j] = (before[j] == s -> NONE : before[j]);
		j++
	:: else -> break
	od;
	j = 0
}

/* Fails when the outsider has connected onto the 4-tuple of a follower. */
inline watch(s) {
	#ifdef WATCH
	j = 0;
	do
	:: j < FOLLOWERS -> assert(!onTuple(j, port[s], dest[s])); j++
	:: else -> break
	od;
	j = 0
	#else
	skip
	#endif
}

/* A program that sets the flag, or takes it away, binds and perhaps connects, as
 * it likes. CONNECTS 0: it stays unconnected, as a server does, with the flag on. */
active [NEIGHBOURS] proctype outsider() {
	do
	:: d_step { port[_pid] == 0 && slot[OUTSIDER].locked == NONE ->
		flag[_pid] = true;
		slot[OUTSIDER].locked = _pid;
		at[_pid] = (slot[OUTSIDER].count > 0 -> slot[OUTSIDER].on[0] : NONE)
	}
	:: d_step { slot[OUTSIDER].locked == _pid && at[_pid] != NONE ->
		if
		:: flag[at[_pid]] -> after(at[_pid], at[_pid])
		:: else -> at[_pid] = NONE; slot[OUTSIDER].locked = NONE
		fi
	}
	:: d_step { slot[OUTSIDER].locked == _pid && at[_pid] == NONE ->
		insert(_pid, OUTSIDER);
		slot[OUTSIDER].locked = NONE;
		printf("%d: outsider binds port %d, flag on\n", _pid, OUTSIDER)
	}
	:: atomic { port[_pid] != 0 && CONNECTS ->
		CHOOSE(dest[_pid], _pid);
		noLongerFirst(_pid);
		tell(port[_pid], dest[_pid]);
		printf("%d: outsider connects to %d\n", _pid, dest[_pid]);
		watch(_pid)
	}
	:: d_step { port[_pid] != 0 && CONNECTS -> flag[_pid] = !flag[_pid]; noLongerFirst(_pid) }
	:: d_step { port[_pid] != 0 && closable(_pid) ->
		close(_pid); noLongerFirst(_pid); printf("%d: outsider closes\n", _pid)
	}
	od
}
#endif
