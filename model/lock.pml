/* How UDP sockets share their ports: see docs/lock-model.md. check runs this. */

#ifndef FOLLOWERS
#define FOLLOWERS 3
#endif
#ifndef NEIGHBOURS
#define NEIGHBOURS 0
#endif
#ifndef PORTS
#define PORTS 1
#endif
#ifndef DESTINATIONS
#define DESTINATIONS 2
#endif
/* Who must not be alone on a 4-tuple with a follower. */
#ifndef SHARERS
#define SHARERS FOLLOWERS
#endif
#ifndef FIRST_COME
#define FIRST_COME 0
#endif

/* bind and the lookup in one step each. */
#ifndef ONE_STEP
#define ONE_STEP 0
#endif
#ifndef TURNS
#define TURNS 0
#endif

/* A lookup that could tell a socket that is just being closed from none. */
#ifndef TELLS_GONE
#define TELLS_GONE 0
#endif

/* Each follower always dials the same destination. */
#ifdef OWN_DESTINATIONS
#define CHOOSE(d, s) d = (s % DESTINATIONS) + 1
#else
#define CHOOSE(d, s) if :: d = 1 :: DESTINATIONS > 1 -> d = 2 :: DESTINATIONS > 2 -> d = 3 fi
#endif
#ifndef MAY_GIVE_UP
#define MAY_GIVE_UP 1
#endif
#ifndef MAY_CLOSE
#define MAY_CLOSE 1
#endif

/* The mutations, each of which must lead to a counterexample. */
#ifndef NO_AWAIT
#define NO_AWAIT 0
#endif
#ifndef NO_COOKIE
#define NO_COOKIE 0
#endif
#ifndef KEEP_FLAG
#define KEEP_FLAG 0
#endif
#ifndef KEEP_LOCK
#define KEEP_LOCK 0
#endif
#ifndef CONNECT_FIRST
#define CONNECT_FIRST 0
#endif
#ifndef NO_FIRST_LOOKUP
#define NO_FIRST_LOOKUP 0
#endif
#ifdef CONNECTED_IS_CONFLICT
#define IS_CONFLICT(remote, wanted) (remote != 0)
#else
#define IS_CONFLICT(remote, wanted) (remote == wanted)
#endif

#define S (FOLLOWERS + NEIGHBOURS)

#include "kernel.pml"
#include "follower.pml"
#include "neighbour.pml"

#if FOLLOWERS == 3
#define is(s) (pc[0] == s && pc[1] == s && pc[2] == s)
#elif FOLLOWERS == 4
#define is(s) (pc[0] == s && pc[1] == s && pc[2] == s && pc[3] == s)
#endif
#ifdef ALL_CONNECT
ltl all_connect { <> is(connected) }
#endif
#ifdef LOCK_STEP
ltl not_in_lock_step { !([] <> (pc[0] == lock) && [] <> (pc[1] == lock) && [] <> (pc[2] == lock)) }
#endif
#if TURNS
ltl all_connect_in_turn { [] (solo != NONE -> <> is(connected)) }
#endif
