/*
 * The method as its article has it: flag on, bind, flag off, one lookup, and any
 * other answer than oneself is a failure. Two dials from one port to two
 * destinations, so there is no conflict.
 */

#define S 2
#define PORTS 1
#include "kernel.pml"

#define wants (_pid + 1)

active [S] proctype dial() {
	d_step { unlocked(1) -> flag[_pid] = true; slot[1].locked = _pid; at[_pid] = (slot[1].count > 0 -> slot[1].on[0] : NONE) };
	do
	:: d_step { at[_pid] != NONE && flag[at[_pid]] -> after(at[_pid], at[_pid]) }
	:: d_step { at[_pid] != NONE && !flag[at[_pid]] ->
		printf("%d: flag on, bind: EADDRINUSE, %d has the flag off\n", _pid, at[_pid]);
		at[_pid] = NONE;
		slot[1].locked = NONE
	}; assert(BIND_MAY_FAIL); goto done
	:: d_step { at[_pid] == NONE -> insert(_pid, 1); slot[1].locked = NONE; printf("%d: flag on, bind: works\n", _pid) };
		break
	od;
	atomic { flag[_pid] = false; printf("%d: flag off\n", _pid) };
	d_step { beginLookup(_pid, 1) };
	do
	:: atomic { at[_pid] != NONE -> visit(_pid, wants) }
	:: at[_pid] == NONE -> break
	od;
	atomic { printf("%d: lookup of the 4-tuple to destination %d: finds %d, not connected\n", _pid, wants, best[_pid]) };
	assert(best[_pid] == _pid);
	d_step { dest[_pid] = wants; printf("%d: connect to destination %d\n", _pid, wants) };
	flag[_pid] = true;
done:	skip
}
