/*
 * A reader on the store's host, its connection, and the guard of what it borrows, for spin.
 *
 * One store with room for one object, and readers that pin it over one connection each and read it
 * in place; a copy of a reader's process may exist (FORK). The store evicts what has no pin and
 * gives the room to another object, a word at a time. What may go wrong at most EVENTS times: a
 * reader asks for more pins than it may have, sends rubbish, or dies.
 *
 *   P8   What a living reader holds is not given to others: not after a refusal, nor after rubbish.
 *   P9   Bytes whose guard was sound after they were read are the object's, even if P8 is broken.
 *   P10  An answer is taken only for what was asked; a forked copy asks nothing.
 *
 * BUG_ are seeded bugs: each must be found. GUARD leaves P8 unchecked, so that a bug in the pins
 * shows whether P9 catches it. The two words of an object stand for all of its bytes; the guard is
 * read in the same order as the C code reads it, and memory is sequentially consistent here: the
 * fences that make it so are the matter of the C code.
 */
#ifndef EVENTS
#define EVENTS 2
#endif
#ifndef READS
#define READS 2 /* of what is held */
#endif
#define READERS  2
#define PINS_MAX 1

#define MINE    1 /* what the object's words are */
#define FOREIGN 2

/* The store. */
byte word[2] = MINE;
byte seal = 1;        /* 0: nobody may read; else what it was when the object was committed */
byte pins;            /* of all connections */
bool committed = true;
byte pinned[READERS]; /* by connection */
byte refused[READERS];
bool mute[READERS];   /* nothing is read from it any more; its pins stay */
bool closed[READERS]; /* by the store */

/* The readers. */
bool dead[READERS];  /* the kernel has closed its end */
byte holds[READERS];

/* That the store closed the connection is seen sooner or later: P9 must not need it. */
#ifdef GUARD
#define LOST(r) false
#else
#define LOST(r) (closed[r])
#endif

byte events;
byte busy = READERS;
#define EVENT_MAY_HAPPEN (busy > 0 && events < EVENTS)

inline unpin_all(r)
{
    pins = pins - pinned[r];
    pinned[r] = 0
}

/* What the store does with a peer that it will not listen to. */
inline drop_peer(r)
{
#ifdef BUG_CLOSE_UNPINS
    unpin_all(r);
    closed[r] = true
#else
    mute[r] = true
#endif
}

proctype Reader(byte r)
{
    byte reads, seen0, seen1, expected;
    bool ok;

    /* A get: the reply tells the seal. */
    atomic {
        ok = committed && !closed[r] && !mute[r];
        if
        :: ok -> pinned[r]++; pins++; holds[r]++; expected = seal
        :: else
        fi
    }
    do
    :: ok && reads < READS ->
        seen0 = word[0];
        seen1 = word[1];
        /* Used only if the seal is what it was, and the connection still there. */
        if
        :: seal != expected || LOST(r) -> ok = false /* A miss: it is computed. */
        :: else -> assert(seen0 == MINE && seen1 == MINE) /* P9 */
        fi;
        reads++
    :: ok && reads < READS && EVENT_MAY_HAPPEN -> /* One pin more than it may have. */
        atomic {
            events++;
            if
            :: closed[r] || mute[r]
            :: else ->
                refused[r]++;
#ifdef BUG_CLOSE_ON_REFUSAL
                unpin_all(r);
                closed[r] = true
#endif
            fi
        }
    :: ok && reads < READS && EVENT_MAY_HAPPEN -> /* Rubbish. */
        atomic {
            events++;
            if
            :: closed[r] || mute[r]
            :: else -> drop_peer(r)
            fi
        }
    :: ok && reads < READS && EVENT_MAY_HAPPEN -> /* kill -9 */
        atomic { events++; dead[r] = true; holds[r] = 0; goto gone }
    :: !ok || reads == READS -> break
    od;
    atomic { /* Released, or let go of with the connection. */
        holds[r] = 0;
        if
        :: pinned[r] > 0 && !mute[r] -> unpin_all(r)
        :: else -> dead[r] = true
        fi
    };
gone:
    atomic { busy-- }
}

proctype Store()
{
end:
    do
    :: atomic { /* The peer's end is closed: the kernel says so. */
        dead[0] && pinned[0] > 0 -> unpin_all(0)
       }
    :: atomic { dead[1] && pinned[1] > 0 -> unpin_all(1) }
    :: atomic { committed && pins == 0 -> committed = false;
#ifndef BUG_SEAL_LATE
        seal = 0
#endif
       };
#ifndef GUARD
        assert(holds[0] == 0 && holds[1] == 0); /* P8 */
#endif
        word[0] = FOREIGN; /* A put of another object into the room. */
        word[1] = FOREIGN;
        seal = 0
    od
}

#ifdef FORK
/* ---- A copy of the process on the same connection ---- */

chan requests = [2] of { byte }; /* the socket, one way and the other */
chan replies = [2] of { byte };

#ifdef BUG_FORK_ASKS
#define COPY_ASKS true
#else
#define COPY_ASKS false /* It knows that it is another process, and refuses the call. */
#endif

/* Each asks for an object of its own, and both number their requests alike. */
proctype Asker(byte wanted; bool asks)
{
    byte got;
    if
    :: asks ->
        requests!wanted;
        replies?got;
#ifndef BUG_NO_ECHO
        if
        :: got != wanted -> got = wanted /* The connection counts as broken: no answer. */
        :: else
        fi;
#endif
        assert(got == wanted) /* P10 */
    :: else
    fi
}

proctype Answerer()
{
    byte wanted;
end:
    do
    :: requests?wanted -> replies!wanted
    od
}
#endif

init
{
    atomic {
#ifdef FORK
        run Asker(1, true);
        run Asker(2, COPY_ASKS);
        run Answerer()
#else
        run Reader(0);
        run Reader(1);
        run Store()
#endif
    }
}
