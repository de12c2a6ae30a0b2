/*
 * The protocol of puts and reads, from Place to unpin, as a model for spin.
 *
 * One segment, one store node, one coordinator, two writers and two readers. At most EVENTS times
 * in all: an eviction, a drop, a put that takes too long, a lost reply, the death of a writer, of
 * a reader, of the store. A d_step is one critical section of the C code. README.md maps the
 * names to the C functions and says what is left out; run.sh checks all of this:
 *
 *   P1  A reader that holds a pin of a generation sees only bytes of that generation.
 *   P2  A shard that was located is there, or was taken away by an event: it was evicted, dropped
 *       or superseded by a newer generation, or its store died.
 *   P3  The pins of a dead reader end, and the room of all that is not committed comes back.
 *   P4  A shard is visible only after its last page; of a put all shards are located, or none.
 *   P5  No process is stuck, and never are more pages in use than there are.
 *   P6  In the end the index and the store agree on what is present.
 *   P7  What was placed before a drop is never visible after it.
 *
 * BUG_ are seeded bugs: each must be found.
 */
#ifndef SHARDS
#define SHARDS 1 /* of the segment: 1 or 2 */
#endif
#ifndef PAGES
#define PAGES 2 /* of a shard */
#endif
#ifndef CAPACITY
#define CAPACITY 4 /* pages of the arena */
#endif
#ifndef GENERATIONS
#define GENERATIONS 3 /* that can be handed out: 2 or 3 */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2 /* of each writer */
#endif
#ifndef EVENTS
#define EVENTS 1
#endif
#define READERS 2

/* A generation is 1, 2, ...; 0 is none. One shard of one generation is an object, 0, 1, ... */
#define OBJECTS       (GENERATIONS * SHARDS)
#define OBJECT(g, s)  (((g) - 1) * SHARDS + (s))
#define GENERATION(o) ((o) / SHARDS + 1)
#define SHARD(o)      ((o) % SHARDS)
#define BIT(o)        (1 << (o))

/* What the bytes of a page are. */
#define BYTES_OF(o) ((o) + 1)
#define FOREIGN     0  /* another segment's; free pages are, for it may have had them since */
#define TORN        99 /* being copied */

mtype = { WRITING, SEALED, COMMITTED, GONE }; /* 0: there is none, or no more */
mtype = { VISIBLE, TAKEN_AWAY };              /* by an event of P2 */

typedef Object {
    mtype state;
    bool room; /* page[] is taken */
    byte page[PAGES];
    byte done;  /* pages written */
    byte pins;  /* of readers, and of a copy under way */
    mtype fate; /* for the assertions only: 0 until it was committed */
}

/* The store. Its second incarnation has another arena; readers keep the first one mapped. */
byte incarnation;
byte arena[2 * CAPACITY];
bool taken[CAPACITY];
byte in_use; /* pages */
Object object[OBJECTS];
byte committed[SHARDS]; /* the generation that readers see */
byte removed;           /* a bit per object: to be told with the next heartbeat */

/* A reader's connection, as the store sees it. */
byte wanted[READERS]; /* the generation that it located */
bool pinned[READERS * SHARDS];
bool dead[READERS];

/* The coordinator. */
byte generations; /* handed out */
bool placed[GENERATIONS + 1];
byte registered; /* incarnation */
byte indexed;    /* generation; 0: the segment is not known */
bool present[SHARDS];
byte tombstone; /* generation */
byte dropped;   /* for the assertions only: the newest generation when the last drop came */
byte placed_removed; /* a bit per object */

byte events;
byte busy = 4; /* writers and readers that are not done: events happen only meanwhile */
#define EVENT_MAY_HAPPEN (busy > 0 && events < EVENTS)

hidden byte i, n, m; /* scratch inside of a step */

/* ---- Store ---- */

inline reap(o)
{
    if
    :: object[o].state == GONE && object[o].pins == 0 ->
        for (i : 0 .. PAGES - 1) {
            if
            :: object[o].room ->
                taken[object[o].page[i]] = false;
                arena[incarnation * CAPACITY + object[o].page[i]] = FOREIGN;
                object[o].page[i] = 0
            :: else
            fi
        }
        in_use = in_use - (object[o].room -> PAGES : 0);
        object[o].room = false;
        object[o].done = 0;
        object[o].state = 0
    :: else
    fi
}

inline shard_remove(o)
{
    if
    :: object[o].state == COMMITTED -> committed[SHARD(o)] = 0
    :: else
    fi;
    object[o].state = GONE;
    reap(o)
}

/* The coordinator would ignore the others. */
inline removed_note(o)
{
    if
    :: indexed == GENERATION(o) || placed[GENERATION(o)] -> removed = removed | BIT(o)
    :: else
    fi
}

#ifndef BUG_EVICT_PINNED
#define EVICTABLE(o) (object[o].state == COMMITTED && object[o].pins == 0)
#else
#define EVICTABLE(o) (object[o].state == COMMITTED)
#endif

inline evict(o)
{
    printf("store: generation %d shard %d is evicted\n", GENERATION(o), SHARD(o));
    object[o].fate = TAKEN_AWAY;
    removed_note(o);
#ifdef BUG_EVICT_PINNED
    object[o].pins = 0;
#endif
    shard_remove(o)
}

inline put_begin(o)
{
    ok = committed[SHARD(o)] < GENERATION(o);
    for (m : 0 .. OBJECTS - 1) {
        if
        :: ok && CAPACITY - in_use < PAGES && EVICTABLE(m) -> evict(m)
        :: else
        fi
    }
#ifndef BUG_ROOM_UNCHECKED
    ok = ok && CAPACITY - in_use >= PAGES;
#endif
    if
    :: ok ->
        n = 0;
        for (i : 0 .. CAPACITY - 1) {
            if
            :: n < PAGES && !taken[i] ->
                taken[i] = true;
                object[o].page[n] = i;
                n++
            :: else
            fi
        }
        in_use = in_use + PAGES;
        assert(in_use <= CAPACITY); /* P5 */
        object[o].room = true;
        object[o].state = WRITING;
        put_at = incarnation
    :: else
    fi
}

#ifndef BUG_WAIT_FOR_ROOM
#define MAY_BEGIN true
#else
#define MAY_BEGIN (CAPACITY - in_use >= PAGES)
#endif

#define PUT_ALIVE   (put_at == incarnation)
#define PUT_OPEN(o) (PUT_ALIVE && object[o].state == WRITING)

/* The copy of a page lies between these two, outside of the mutex. */
inline put_page_begin(o)
{
    ok = PUT_OPEN(o);
    if
    :: ok ->
#ifndef BUG_COPY_UNPINNED
        object[o].pins++;
#endif
        target = incarnation * CAPACITY + object[o].page[object[o].done];
        arena[target] = TORN
    :: else
    fi
}

inline put_page_end(o)
{
    if
    :: PUT_ALIVE ->
        arena[target] = BYTES_OF(o);
#ifndef BUG_COPY_UNPINNED
        object[o].pins--;
#endif
        reap(o)
    :: else
    fi;
    ok = PUT_OPEN(o);
    object[o].done = object[o].done + (ok -> 1 : 0);
    target = 0
}

#ifndef BUG_EARLY_SEAL
#define PAGES_TO_SEAL PAGES
#else
#define PAGES_TO_SEAL (PAGES - 1)
#endif

inline put_seal(o)
{
    ok = PUT_OPEN(o);
    if
    :: ok ->
        printf("store: generation %d shard %d is sealed\n", GENERATION(o), SHARD(o));
        object[o].state = SEALED
    :: else
    fi
}

inline put_destroy(o)
{
    if
    :: PUT_OPEN(o) -> shard_remove(o)
    :: else
    fi
}

#define STAGED(o) (object[o].state == WRITING || object[o].state == SEALED)

#ifndef BUG_OLDER_WINS
#define NEWER_HELD(o) (committed[SHARD(o)] > GENERATION(o))
#else
#define NEWER_HELD(o) (false)
#endif

inline store_commit(o)
{
    ok = false;
    if
    :: committed[SHARD(o)] == GENERATION(o) -> ok = true
    :: NEWER_HELD(o) ->
        if
        :: STAGED(o) -> shard_remove(o)
        :: else
        fi
    :: committed[SHARD(o)] != GENERATION(o) && !NEWER_HELD(o) && object[o].state == SEALED ->
        ok = true;
        assert(object[o].done == PAGES); /* P4 */
        if
        :: committed[SHARD(o)] != 0 ->
            n = OBJECT(committed[SHARD(o)], SHARD(o));
            object[n].fate = (n < o -> TAKEN_AWAY : object[n].fate);
#ifndef BUG_SUPERSEDED_UNTOLD
            removed_note(n);
#endif
            shard_remove(n)
        :: else
        fi;
        printf("store: generation %d shard %d is committed over %d\n", GENERATION(o), SHARD(o),
               committed[SHARD(o)]);
        committed[SHARD(o)] = GENERATION(o);
        object[o].fate = VISIBLE;
        object[o].state = COMMITTED
    :: else -> printf("store: generation %d shard %d is not there\n", GENERATION(o), SHARD(o))
    fi
}

inline store_drop(o)
{
    if
    :: object[o].state == COMMITTED ->
        printf("store: generation %d shard %d is dropped\n", GENERATION(o), SHARD(o));
        object[o].fate = TAKEN_AWAY;
        removed_note(o);
        shard_remove(o)
    :: STAGED(o) -> shard_remove(o)
    :: else
    fi
}

inline pin(r, s)
{
    n = OBJECT(wanted[r], s);
    ok = committed[s] == wanted[r];
    if
    :: ok ->
        printf("reader %d: pins generation %d shard %d\n", r, wanted[r], s);
        object[n].pins++;
        pinned[r * SHARDS + s] = true;
        for (i : 0 .. PAGES - 1) {
            at[s * PAGES + i] = incarnation * CAPACITY + object[n].page[i]
        }
    :: else -> assert(object[n].fate == TAKEN_AWAY) /* P2 */
    fi
}

inline unpin(r, s)
{
    if
    :: pinned[r * SHARDS + s] ->
        printf("reader %d: generation %d shard %d is unpinned\n", r, wanted[r], s);
        pinned[r * SHARDS + s] = false;
        n = OBJECT(wanted[r], s);
#ifdef BUG_EVICT_PINNED
        object[n].pins = (object[n].pins > 0 -> object[n].pins : 1);
#endif
        object[n].pins--;
        reap(n)
    :: else
    fi
}

/* ---- Coordinator ---- */

#define OTHER(s) (SHARDS - 1 - (s))
#if SHARDS == 1
#define ALL_PRESENT   present[0]
#define HOLDS_PIN(r)  pinned[r]
#define NUM_COMMITTED (committed[0] != 0)
#else
#define ALL_PRESENT   (present[0] && present[1])
#define HOLDS_PIN(r)  (pinned[(r) * 2] || pinned[(r) * 2 + 1])
#define NUM_COMMITTED ((committed[0] != 0) + (committed[1] != 0))
#endif
#define LOCATABLE (indexed != 0 && ALL_PRESENT)

/* Not ok: it is committed already, or the model has no more generations. */
inline place()
{
    ok = ok && !LOCATABLE && generations < GENERATIONS;
    if
    :: ok ->
        generations++;
        generation = generations;
        printf("writer %d: places generation %d\n", me, generation);
        placed[generation] = true;
        placed_at = registered
    :: else
    fi
}

inline check_still_good(g)
{
    ok = indexed <= g && placed_at == registered;
#ifndef BUG_COMMIT_DROPPED
    ok = ok && g > tombstone
#endif
}

inline publish(g)
{
    check_still_good(g);
    if
    :: ok ->
        printf("coordinator: publishes generation %d over %d\n", g, indexed);
        for (m : 0 .. SHARDS - 1) {
            if
            :: present[m] && indexed < g -> n = OBJECT(indexed, m); store_drop(n)
            :: else
            fi;
#ifndef BUG_REMOVED_WHILE_PLACED
            present[m] = (placed_removed & BIT(OBJECT(g, m))) == 0
#else
            present[m] = true
#endif
        }
        indexed = g;
    :: else
    fi;
    placed[g] = false
}

inline commit_shard(g, s)
{
    store_commit(OBJECT(g, s));
#ifdef BUG_PUBLISH_EACH
    if
    :: ok -> indexed = g; present[s] = true
    :: else
    fi
#endif
}

inline locate(r)
{
    ok = LOCATABLE;
    if
    :: ok ->
        for (i : 0 .. SHARDS - 1) {
            n = OBJECT(indexed, i);
            assert(object[n].fate != 0) /* P4 */
        }
        assert(indexed > dropped); /* P7 */
        printf("reader %d: locates generation %d\n", r, indexed);
        wanted[r] = indexed
    :: else
    fi
}

inline heartbeat()
{
    for (n : 0 .. OBJECTS - 1) {
        if
        :: (removed & BIT(n)) && indexed == GENERATION(n) -> present[SHARD(n)] = false
        :: (removed & BIT(n)) && placed[GENERATION(n)] -> placed_removed = placed_removed | BIT(n)
        :: else
        fi
    }
    printf("coordinator: hears what was removed\n");
    removed = 0
}

/* The former incarnation's shards are lost; then the store announces what it holds. */
inline register_and_announce()
{
    for (m : 0 .. SHARDS - 1) {
        present[m] = false
    }
    for (m : 0 .. SHARDS - 1) {
        if
        :: committed[m] != 0 && !placed[committed[m]] ->
            if
            :: committed[m] <= tombstone || committed[m] < indexed ->
                n = OBJECT(committed[m], m);
                store_drop(n)
            :: committed[m] > tombstone && committed[m] == indexed -> present[m] = true
            :: committed[m] > tombstone && committed[m] > indexed ->
                if /* The other shard is of an older generation. */
                :: present[OTHER(m)] -> n = OBJECT(indexed, OTHER(m)); store_drop(n)
                :: else
                fi;
                present[OTHER(m)] = false;
                present[m] = true;
                indexed = committed[m]
            fi
        :: else
        fi
    }
    printf("coordinator: the store registers and announces\n");
    registered = incarnation
}

/* ---- Processes ---- */

#define CRASH (me == 0 && EVENT_MAY_HAPPEN)

/* One critical section, and where to go on. */
#define STEP(action, otherwise)                                                                  \
    d_step { action };                                                                           \
    if                                                                                           \
    :: !ok -> goto otherwise                                                                     \
    :: else                                                                                      \
    fi

proctype Writer(byte me)
{
    byte attempts, generation, shard, pages, placed_at, put_at, target;
    bool ok;

again:
    atomic { STEP(ok = (attempts < ATTEMPTS); attempts++; place(), done) }
    do /* Put */
    :: atomic { shard < SHARDS && MAY_BEGIN -> STEP(put_begin(OBJECT(generation, shard)), failed) };
        do
        :: atomic { pages < PAGES -> STEP(put_page_begin(OBJECT(generation, shard)), failed) };
            atomic { STEP(put_page_end(OBJECT(generation, shard)); pages++, failed) }
        :: atomic { pages >= PAGES_TO_SEAL ->
            STEP(put_seal(OBJECT(generation, shard)); pages = 0; shard++, failed); break }
        :: atomic { CRASH -> goto killed }
        od
    :: atomic { shard == SHARDS -> STEP(shard = 0; check_still_good(generation), undo); break }
    :: atomic { CRASH -> goto killed }
    od;

    do /* Commit: the coordinator goes on with it whatever becomes of the writer. */
    :: atomic { shard < SHARDS -> STEP(commit_shard(generation, shard); shard++, undo) }
    :: atomic { shard < SHARDS && EVENT_MAY_HAPPEN -> /* The reply is lost. */
        d_step { store_commit(OBJECT(generation, shard)); shard++; ok = false; events++;
            printf("coordinator: the reply is lost\n") };
        goto undo }
    :: atomic { shard == SHARDS -> STEP(publish(generation), undo); goto done }
    od;

undo:
    atomic { placed[generation] = false };
    do
    :: atomic { shard > 0 -> d_step { shard--; store_drop(OBJECT(generation, shard)) } }
    :: atomic { shard == 0 -> goto again }
    od;

failed: /* Abort. What is staged goes by Upkeep. */
    atomic { placed[generation] = false; shard = 0; pages = 0; put_at = 0; goto again }

killed: /* Its stream ends; its put expires. */
    atomic {
        if
        :: shard < SHARDS -> d_step { put_destroy(OBJECT(generation, shard)); ok = false }
        :: else
        fi;
        placed[generation] = false;
        printf("writer %d: dies\n", me);
        events++
    }
done:
    atomic {
        attempts = 0; generation = 0; shard = 0; pages = 0; placed_at = 0; put_at = 0; ok = false;
        busy--
    }
}

proctype Reader(byte me)
{
    byte shard;
    byte at[SHARDS * PAGES]; /* in the mapped arena */
    bool ok;

    atomic { STEP(locate(me), done) };
    do
    :: atomic { shard < SHARDS -> STEP(pin(me, shard); shard++, release) }
#ifndef LIVENESS
    :: d_step { /* It looks as often as it likes. */
        shard == SHARDS ->
        i = 0;
        do
        :: i < SHARDS * PAGES ->
            assert(arena[at[i]] == BYTES_OF(OBJECT(wanted[me], i / PAGES))); /* P1 */
            i++
        :: else -> break
        od;
        i = 0
       }
#endif
    :: atomic { shard == SHARDS -> goto release }
    :: atomic { shard > 0 && CRASH -> dead[me] = true; events++;
        printf("reader %d: dies\n", me); goto done }
    od;

release:
    do
    :: atomic { shard > 0 -> d_step { shard--; unpin(me, shard) } }
    :: atomic { shard == 0 -> wanted[me] = 0; goto done }
    od;

done:
    atomic {
        for (i : 0 .. SHARDS * PAGES - 1) {
            at[i] = 0
        }
        shard = 0;
        ok = false;
        busy--
    }
}

/* A put that goes on is collected only when it takes too long. */
#define COLLECT(o)                                                                               \
    d_step {                                                                                     \
        STAGED(o) && (!placed[GENERATION(o)] || EVENT_MAY_HAPPEN) ->                             \
        events = events + (placed[GENERATION(o)] -> 1 : 0);                                      \
        printf("store: generation %d shard %d is collected\n", GENERATION(o), SHARD(o));         \
        shard_remove(o)                                                                          \
    }

/* What the store and the coordinator do by themselves. */
proctype Upkeep()
{
end:
    do
#ifndef BUG_PINS_LEAK
    :: d_step { /* The connection of a dead reader closes. */
        dead[0] && HOLDS_PIN(0) ->
        for (m : 0 .. SHARDS - 1) {
            unpin(0, m)
        }
        wanted[0] = 0
       }
#endif
    :: COLLECT(0)
    :: COLLECT(1)
#if OBJECTS > 2
    :: COLLECT(2)
#endif
#if OBJECTS > 3
    :: COLLECT(3)
#endif
#if OBJECTS > 4
    :: COLLECT(4)
    :: COLLECT(5)
#endif
    :: d_step { registered != incarnation -> register_and_announce() }
    :: d_step { registered == incarnation && removed != 0 -> heartbeat() }
    od
}

#define PINNED_BY(r, o) (wanted[r] == GENERATION(o) && pinned[(r) * SHARDS + SHARD(o)])

#define EVICT(s)                                                                                 \
    d_step {                                                                                     \
        EVENT_MAY_HAPPEN && committed[s] != 0 && EVICTABLE(OBJECT(committed[s], s)) ->           \
        events++;                                                                                \
        n = OBJECT(committed[s], s);                                                             \
        evict(n)                                                                                 \
    }

proctype Events()
{
end:
    do
    :: EVICT(0) /* for a shard of another segment */
#if SHARDS > 1
    :: EVICT(1)
#endif
    :: d_step { /* Drop */
        EVENT_MAY_HAPPEN && indexed != 0 ->
        events++;
        printf("coordinator: drops generation %d\n", indexed);
        dropped = generations;
#ifndef BUG_DROP_VISIBLE_ONLY
        tombstone = generations;
#else
        tombstone = indexed;
#endif
        for (m : 0 .. SHARDS - 1) {
            if
            :: present[m] ->
                present[m] = false;
                n = OBJECT(indexed, m);
                store_drop(n)
            :: else
            fi
        }
        indexed = 0
       }
    :: d_step { /* kill -9 of the store, and its restart. What is not mapped is gone. */
        EVENT_MAY_HAPPEN && incarnation == 0 ->
        for (n : 0 .. OBJECTS - 1) {
            for (i : 0 .. PAGES - 1) {
                if
                :: object[n].room && !PINNED_BY(0, n) && !PINNED_BY(1, n) ->
                    arena[object[n].page[i]] = FOREIGN
                :: else
                fi
            }
        }
        for (n : 0 .. OBJECTS - 1) {
            for (i : 0 .. PAGES - 1) {
                object[n].page[i] = 0
            }
            object[n].fate = (object[n].state == COMMITTED -> TAKEN_AWAY : object[n].fate);
            object[n].state = 0;
            object[n].room = false;
            object[n].done = 0;
            object[n].pins = 0
        }
        for (i : 0 .. CAPACITY - 1) {
            taken[i] = false
        }
        for (i : 0 .. SHARDS - 1) {
            committed[i] = 0
        }
        for (i : 0 .. READERS * SHARDS - 1) {
            pinned[i] = false
        }
        in_use = 0;
        removed = 0;
        printf("store: restarts\n");
        events++;
        incarnation++
       }
    od
}

#ifndef LIVENESS
/* When nothing is left to do. */
proctype Final()
{
    timeout ->
    d_step {
        assert(busy == 0); /* P5 */
        for (i : 0 .. READERS * SHARDS - 1) {
            assert(!pinned[i]) /* P3 */
        }
        assert(in_use == NUM_COMMITTED * PAGES); /* P3 */
        for (i : 0 .. SHARDS - 1) {
            assert(present[i] == (committed[i] != 0)); /* P6 */
            assert(committed[i] == 0 || committed[i] == indexed) /* P6 */
        }
        assert(indexed == 0 || indexed > dropped) /* P7 */
    }
}
#endif

init
{
    atomic {
        run Writer(0);
        run Writer(1);
        run Reader(0);
        run Reader(1);
        run Upkeep();
        run Events();
#ifndef LIVENESS
        run Final()
#endif
    }
}

#ifdef LIVENESS
ltl pins_end { [] ((dead[0] && HOLDS_PIN(0)) -> <> !HOLDS_PIN(0)) } /* P3 */
ltl room_back { <> [] (in_use == NUM_COMMITTED * PAGES) }            /* P3 */
#endif
